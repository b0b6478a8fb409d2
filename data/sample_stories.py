"""Built-in training text: short children's stories told by a small seeded grammar.

A plot is a block of PLOTS: "# title | casts | word lists", then three paragraphs. A line that starts with a
space continues the line before it. A word list is "name = one; two; three", and " | " separates two lists.
Names may share rows: "x y = x1/y1; x2/y2". In a text, {name} is a word that stays the same for the whole
story, {Name} is that word with a capital, and [this|that] is a choice of wording (brackets do not nest).
To add a plot, add a block.
"""

import random
import re
from collections.abc import Iterator
from itertools import permutations

BRACKET = re.compile(r"\[([^\]]*)\]")

GIRLS = """Mia; Lily; Anna; Sara; Emma; Zoe; Ella; Ruby; Nora; Ivy; Rosie; Daisy; Lucy; Amy; Maya; Hanna;
 Clara; Lena; Kate; Sofia; Poppy; Alice; Eva; Jane; Wendy; Molly; Nina; Bella; Tara; Sally; Cora; Leah; Amina;
 Priya; Yuki; Rosa; Carmen; Greta; Freya; Heidi; Julia; Naomi; Tilly; Vera; Zara; Ada; Iris; Paula; Gwen"""
BOYS = """Tom; Ben; Max; Sam; Leo; Jack; Tim; Finn; Noah; Oscar; Luke; Adam; Theo; Hugo; Milo; Henry; Eli;
 Owen; Jake; Ravi; Omar; Kai; Diego; Peter; Simon; Felix; Oliver; Toby; Nick; Dan; Harry; George; Victor;
 Walter; Ned; Emil; Anton; Pablo; Amir; Kofi; Arthur; Ralph; Paul; Rory; Bruno; Jasper; Ivan; Hiro"""
SHE_PETS = """Hazel; Dot; Juniper; Ginger; Coco; Olive; Bluebell; Tansy; Pansy; Minty; Willa; Lottie;
 Primrose; Saffron; Birdie; Luna; Peaches; Snowdrop; Marigold; Velvet; Periwinkle; Cupcake; Honey; Flora"""
HE_PETS = """Pip; Bramble; Biscuit; Button; Thistle; Acorn; Waffle; Sprout; Tumble; Noodle; Peanut; Scout;
 Twig; Patch; Pickle; Fidget; Rusty; Burly; Chip; Barnaby; Ziggy; Boomer; Barley; Cricket; Pogo; Truffle"""
KINDS = """rabbit; fox; bear; mouse; hedgehog; squirrel; badger; raccoon; mole; hamster; koala; panda;
 monkey; kitten; puppy; lamb; piglet; chipmunk; weasel; wombat; porcupine; skunk; gopher; lemur; hare; lynx"""
SHE, HE = "she/her/her/herself", "he/him/his/himself"
# The girl and the boy of each cast: names, what they are, how to speak of one as a friend, and pronouns. A
# hero's friend is of the other sex, so that "he" and "she" are never in doubt.
PEOPLE = {
    "child": ((GIRLS, "girl", "friend; cousin; sister", SHE), (BOYS, "boy", "friend; cousin; brother", HE)),
    "animal": ((SHE_PETS, KINDS, "friend; neighbor", SHE), (HE_PETS, KINDS, "friend; neighbor", HE)),
}
HERO = "\na = {0}\nboy = {1}\nhe him his himself = {3}\n"
FRIEND = "b = {0}\nbboy = {1}\npal = {2}\nbhe bhim bhis bhimself = {3}\n"

# Lists for every plot. The hero is {a}, a {boy}; the friend is {b}, a {bboy}, at first {his} {buddy}.
COMMON = """trait = brave; kind; curious; gentle; cheerful; clever; shy; playful; friendly; quiet; lively;
 polite; thoughtful; merry; bold; dreamy; bright; sweet; funny; bouncy; eager; loving; daring; jolly; giggly;
 sensible; talkative; bashful; spirited; sleepy; lovable; inventive; humble; charming; chatty; adventurous |
 open = Once upon a time, there was a {trait} {boy} named {a}.; There once was a {trait} little {boy} called
 {a}.; Once there lived a {trait} {boy} whose name was {a}.; {a}, a {trait} little {boy}, lived in {home}.;
 {a} was a {trait} {boy} with {look}.; {a} was a {trait} {boy}, and {he} loved to {hobby}.; There was once a
 {trait} {boy}, {a}, who dreamed of being a {job}.; Everybody knew {a}, a {trait} {boy} who loved to {hobby}.
 | hobby = make up songs; splash in puddles; ask questions; roll down hills; count the clouds; collect shiny
 stones; chase butterflies; hum; laugh; climb trees; hear fairy tales; watch spiders; solve riddles; smell
 flowers; knit socks; wrestle; somersault; doze in the shade; invent recipes | job = baker; pilot; farmer;
 doctor; sailor; carpenter; painter; clown; firefighter; dentist; juggler; tailor; astronaut; plumber;
 shepherd; detective; poet; blacksmith; gardener; magician; nurse; potter; scientist | one = one day; one fine
 morning; one Saturday; one quiet afternoon; one Sunday morning; early one morning; one mild afternoon; one
 lazy day; one Thursday; one pleasant afternoon | color = red; blue; green; yellow; purple; orange; pink;
 silver; golden; striped; spotted; white; turquoise; crimson; checkered; brown; violet; scarlet; beige; black
 | mom = mom; dad; grandma; grandpa; mama; papa; granny; mommy; daddy; nana | warmly = softly; kindly; gently;
 warmly; with a smile; calmly; with a wink; cheerfully; patiently | sad = {a} felt very sad.; {a} sighed a
 long sigh.; {His} eyes filled with tears.; {a} wanted to cry.; A tear rolled down {his} cheek.; {a} hung
 {his} head.; {His} chin began to tremble.; {a} felt gloomy.; "This is hopeless," groaned {a}.; {a} sniffled.
 | yay = "Hooray!" shouted {a}.; {a} jumped for joy.; {a} laughed out loud.; {a} did a happy little dance.;
 {a} beamed with pride.; {a} could not stop smiling.; {a}'s face lit up like the sun.; "Wonderful!" cried {a}.
 | thanks = "Thank you, {b}!" {he} said.; {He} gave {b} a big hug.; {He} thanked {b} again and again.; {He}
 hugged {b} tightly.; "You are the best, {b}!" {he} cried. | close = That night, {a} fell asleep with a
 smile.; {a} always remembered that day.; It had been a wonderful day.; {a} went to bed tired and happy.; It
 was the best day of the week.; They had {supper} for supper.; That night, {a} dreamed of {dream}. | supper =
 tomato soup; hot noodles; fried fish; mashed potatoes; vegetable stew; cornbread; onion omelets; dumplings;
 spaghetti; buttered peas; baked squash; warm porridge; ravioli | dream = flying carpets; dancing hippos;
 candy mountains; friendly sharks; talking parsley; silver bridges; rainbows; singing teapots; paper boats;
 snowy forests; marshmallow clouds; glowing jellyfish; purple giraffes; waltzing penguins; circus zebras;
 velvet caterpillars; kangaroos on bicycles; a marble palace; coral islands; ostriches in boots; musical
 snails; wandering icebergs"""
CASTS = {
    "child": """buddy = {pal} {b} | home = a small yellow house; a cottage by the sea; an apartment above a
 bakery; a busy city; a sleepy village; a farmhouse on a hill; a valley full of orchards; a town beside a
 river; a houseboat; a cabin near the forest | look = curly hair; freckles; rosy cheeks; a loud laugh; muddy
 boots; big brown eyes; a pocket full of string; scabs on both knees; glasses; a crooked grin; dimples; dusty
 sandals; a denim jacket; a woolen sweater; one loose tooth""",
    "animal": """buddy = {pal} {b} the {bboy} | home = a cozy den; a snug house under a hill; a cottage made
 of twigs; a hollow tree; a green forest; a sunny glade; a tiny hut beside a brook; a burrow with a round
 door; a quiet grove | look = soft fur; bright eyes; a striped scarf; a tiny hat; a round belly; shiny
 whiskers; a twitchy nose; a fluffy tail; tiny paws; a patched vest; fuzzy eyebrows; a button nose""",
}

PLOTS = """
# The toy up high | child animal | toy = kite; paper plane; toy glider; flying disc; beach ball; toy rocket;
 shuttlecock; parachute | perch = in the top of a tall oak tree; on a shed; on top of a mossy wall; high up in
 a bushy pine; on a bus stop | pole = broom; rake; mop; fishing net; bamboo stick; hockey stick; canoe paddle
 | park = park; playground; village green; soccer field; courtyard; airfield; heath
{open} {One}, {he} took {his} {color} {toy} to the {park} and wished to see it touch the clouds. Up it went,
 but [a strong gust of wind|a sudden breeze] [caught it|blew it sideways], and it landed {perch}. {sad}
First, {a} jumped with all {his} might, but it was [much|far] too high. Next, {he} threw a [pine cone|soft
 mitten|muddy shoe] at the {toy}, but it [missed|only scared a sleepy pigeon]. Then {his} {buddy} came
 [skipping|strolling] by with a {pole}. It was too short. "[Together we are tall|Two of us make one giant],"
 {b} said {warmly}. "Climb onto my shoulders!"
{a} climbed up and gave the {toy} a [tiny|gentle] [poke|nudge] with the {pole}. It [wobbled|slid|rocked] and
 [came sailing down|tumbled down] into the grass. {yay} {thanks} They played in the middle of the {park}, [far
 away from anything tall|where nothing could catch the {toy}]. {close}
# The broken treasure | child | trait = wild; lively; playful; bouncy; merry; restless; noisy; jolly; rowdy |
 thing = teapot; flower vase; glass lamp; china plate; clay bird; sugar bowl; cookie jar; painted mug;
 porcelain bell | game did = bounce a ball/bounced a ball; gallop on a broomstick/galloped on a broomstick;
 spin like a top/spun like a top; toss pillows/tossed pillows; do cartwheels/did cartwheels; juggle
 potatoes/juggled potatoes | pet = cat; dog; parrot; puppy; gerbil; canary; tortoise; cockatoo; ferret
{open} One [rainy|stormy|dreary] [morning|Sunday], {he} wanted to {game}, but the yard was [full of
 puddles|one big swamp]. "No wild games inside, please," said {his} {mom}. {a} did not listen. {He} {did}
 indoors until... [Crash|Smash|Clang]! {Mom}'s favorite {thing} fell off the [shelf|table] and broke.
First, {a} [pushed|swept] the pieces under the [rug|sofa], but a sharp corner stuck out. Then {he} wanted to
 say that the {pet} did it, but the {pet} looked up with [big|trusting] eyes, and {a} felt [a knot in {his}
 tummy|hot and ashamed]. So {he} went to {Mom}. "I broke your {thing}," {he} [whispered|sobbed].
{Mom} hugged {a}. "I am [glad|proud] that you told me the truth," said {Mom}. They glued the {thing} [piece
 by piece|like a puzzle]. A thin crack still showed, like [a smile|a tiny river|a flash of lightning].
 Whenever {a} saw it, {he} remembered that [the truth mends more than glue|hiding feels worse than telling].
# One for two | child animal | thing how = wagon/one pulled and the other rode; swing/one pushed and the
 other flew up to the leaves; hammock/one rocked it and the other told a story; drum/one drummed and the other
 danced; wheelbarrow/one pushed and the other steered; telescope/one looked and the other drew the stars;
 trumpet/one played and the other marched; rowboat/one rowed and the other watched for fish; tricycle/one
 pedaled and the other rang the bell | where = behind the barn; at the end of the lane; near the old mill;
 next to the pond; under a chestnut tree; beside the fountain; outside the smithy; between two haystacks
{open} {One}, {he} was [exploring|out for a walk] with {his} {buddy} when they found a [dusty|forgotten]
 {color} {thing} {where}. Both wished to keep it. "Mine!" [shouted|cried] {a}. "No, mine!" yelled {b}.
They pulled on it from both sides until they [fell down with a bump|landed in the mud]. Then they shouted
 until even the [crows|sparrows|frogs] went away. At last {b} left [in a huff|in tears], and {a} had the
 {thing} all to {himself}. But playing alone was [no fun|dull]. {sad} {He} found {b} [on a stump|under a
 bush|behind a log]. "I am sorry," {he} said. "Let us take turns, and you may go first."
{b} looked up and [smiled|nodded]. They [raced|hurried] back and tried it together: {how}. Then they traded
 places. It was [twice|ten times] as much fun! {yay} "One {thing} is [plenty|just right] for two friends," {b}
 said {warmly}. They never [quarreled|fought] over it again. {close}
# The noise in the night | child | trait = gentle; quiet; dreamy; thoughtful; sweet; kind; careful; polite;
 timid | sound cause = Tap, tap, tap/a thin branch, knocking on the window; Scratch, scratch/a lost kitten,
 scratching at the door; Hoo, hoo/a baby owl, calling for its mother; Drip, drip, drip/rain, dripping into a
 tin bucket; Squeak, squeak/a rusty gate, swinging in the wind; Rattle, rattle/an empty can, rolling around
 the yard; Rustle, rustle/a hedgehog, hunting for beetles; Thump, thump/ripe apples, falling on the roof of
 the shed | monster = monster; giant; ghost; troll; witch; goblin; pirate; wolf | light = lantern; candle
{open} {He} was afraid of the dark. One [windy|cloudy|moonless|chilly] night, {a} was wishing for [a good
 long sleep|sweet dreams] when {he} heard a strange sound. "{sound}," it went. Was it a {monster}?
First, {he} pulled the blanket over {his} head, but {he} could still hear it. Then {he} [sang a song into the
 pillow|counted to fifty], but the sound did not stop. At last {a} [tiptoed|ran] to {his} {mom}. "There is a
 {monster} outside," {he} said, [shivering|close to tears]. {Mom} did not laugh. "[Fear grows in the
 dark|Scary things shrink in the light]," {Mom} said {warmly}. "Let us take the {light} and look together."
Outside, {a} held up the {light}. There was no {monster} at all! It was only {cause}. {a} [giggled|laughed
 with relief]. "[You were brave to look|Now you know]," said {Mom}. The next time {he} heard a strange sound,
 {he} [reached for the {light}, not for the blanket|was more curious than scared].
# The new skill | child animal | skill fail fail2 tip win = ride a bike/the bike tipped into a bush/{he}
 rolled into a haystack/Look far ahead, not down at your feet/rode all the way to the mailbox; swim/{he}
 swallowed a mouthful of water/{he} only went in a circle/Lie back like a starfish and let the water hold
 you/swam right across the pool; skate/{his} feet slid apart/{he} could not stop and hugged a lamppost/Bend
 your knees a little/glided to the corner; whistle/only air came out/{he} blew until {his} cheeks hurt/Make a
 small round hole with your lips/whistled a whole tune; jump rope/the rope slapped {his} toes/{he} got tangled
 like a fly in a web/Listen for the tap, and then hop/jumped ten times
{open} All {his} friends could {skill}, and {a} wished to {skill} more than anything [else|in the world].
 "Today is the day," {he} told {his} {mom} {one}, and {he} [set to work|began at once].
On the first try, {fail}. On the second try, {fail2}. [It was no use.|No luck!] "I will never learn it!" {a}
 [groaned|wailed] and [hid {his} face|sat down]. {His} {buddy} [saw it|had been watching] and came over. "It
 took me [a whole week|a hundred tries] to learn," {b} said {warmly}. "Do you want to know the trick? {tip}."
{a} did just what {b} had said, [slowly|shakily] at first. {He} tried once, twice, and [many times more|a
 third time]. Then, [all at once|suddenly|like magic], {he} {win}! {yay} {thanks} The next [week|month],
 somebody smaller wanted to {skill} too, and it was {a} who [was the teacher|told the trick]. "[Falling down
 is a part of learning|You only fail when you stop trying]," {he} said.
# The lost little one | child | baby mother place cry answer = duckling/duck/among the reeds of the
 pond/Peep/quack; chick/hen/in front of the hen house/Cheep/cluck; lamb/sheep/on the green hill/Maa/bleat;
 gosling/goose/on the bank of the lake/Weep/honk; calf/cow/at the pasture gate/Muh/moo; piglet/pig/in the
 muddy pen/Wee/grunt; kitten/cat/up in the hayloft/Mew/meow; foal/horse/beside the stable/Hee/neigh | other =
 donkey; llama; turkey; camel; toad; mule; peacock; lizard | snack = some grass; a crumb of bread; a slice of
 apple; a cracker; some oats; a leaf of lettuce; a dandelion; a grain of wheat; a slice of papaya
{open} {One}, {he} was walking down a [dusty|muddy|winding] path when {he} heard a small cry. "{cry}! {cry}!"
 [Behind a thistle|Under a fern] sat a [tiny|shaky|lost] {baby}. {a} wished to find its mother.
First, {a} met a {other}. "Is this your baby?" {he} asked, but the {other} [shook its head|only blinked].
 Next, {he} gave the {baby} {snack}, but it [was too sad to eat|turned away]. {sad} Then {he} met {his}
 {buddy} and showed {bhim} the {baby}. "Let us be quiet and listen," {b} said {warmly}. They [stood as still
 as stones|held their breath]. From far away, they heard a [long|worried] {answer}.
They ran through [a gap in the hedge|a field of barley]. There, {place}, stood a mother {mother}! The {baby}
 [wriggled|leaped] out of {a}'s arms and ran to her. {yay} "[Good ears|A little quiet] helped more than [many
 words|all our running]," said {b}. All the way home, they heard a happy {answer} behind them. {close}
# The missing ingredient | child animal | dish = plum cake; apple pie; cherry tart; lemon cake; carrot cake;
 walnut loaf; blueberry pie; peach pie; chocolate cake; coconut cake | miss bad = eggs/as dry as sand;
 flour/as thin as soup; butter/as tough as leather; milk/as stiff as clay; sugar/as sour as a pickle | swap =
 vanilla; raisins; jam; nuts; oats; yeast; almonds; syrup | found = a lonely onion; a jar of mustard; one dry
 bean; an empty tin; a wrinkled potato; a bag of rice; a stick of celery | old = Mrs. Finch; Mr. Crumb; Mrs.
 Plum; Mr. Brook; Mrs. Willow; Mr. Stone; Mrs. Clement; Mr. Dobbin; Mrs. Quill; Mr. Hatch; Mrs. Moss
{open} {One}, {a} wished to bake a {dish} for {his} {mom}, who had [a bad cold|worked so hard|a birthday].
 {He} [tied on an apron|washed the big bowl] and looked in the cupboard. "Oh dear! No {miss}!" cried {a}.
First, {he} searched every shelf, but {he} only found {found}. Then {he} tried to do without {miss}, but the
 batter came out {bad}. {sad} {His} {buddy} [peeked in through|knocked on] the window. "Why don't you ask
 {old} next door?" asked {b}. So they went there together. {old} [laughed|chuckled]. "I have plenty of {miss},
 but I need some {swap}." And {a} had a whole jar of {swap} at home!
So they traded. {a} stirred the batter, and {b} [greased the pan|licked the spoon]. Soon the house smelled
 [sweet|like a bakery]. {yay} When {Mom} saw the {dish}, there were happy [tears|hugs]. "I had a good neighbor
 and a [clever|cheerful] helper," said {a}. {old} ate the biggest slice in [three bites|a blink]. {close}
# The slow seed | child animal | plant result feast = pumpkin/a pumpkin as big as a barrel/a pot of pumpkin
 soup; sunflower/a sunflower taller than the fence/a bowl of crunchy seeds; bean/a vine as high as the
 window/a pot of bean stew; strawberry/a row of red strawberries/twelve jars of jam; melon/three fat melons
 with green stripes/a tray of cool melon slices; tomato/a bush full of ripe tomatoes/a pan of spicy sauce;
 corn/a stalk of golden corn/a bucket of buttery popcorn | pot = sunny corner of the garden; wide wooden tub;
 patch of dark soil; raised bed; clay urn; plot beside the lilacs; window box full of soil
{open} {One} in spring, {his} {mom} gave {him} a {plant} seed. {a} [dropped|laid] it into a hole in a {pot}.
 "I wish for {result} tomorrow!" {he} [said|sang]. In the morning, there was [only dirt|no speck of green].
First, {a} dug up the seed to see if it was awake. Next, {he} bent down and shouted, "[Grow|Wake up|Hurry]!"
 A worm looked out, but no leaf did. Then {he} poured [three buckets|a whole tub] of water on it and made a
 swamp. {sad} "It is growing where you cannot see it," {Mom} said {warmly}. "A seed needs [a sip|a cup] of
 water, a bit of sun, and [a lot of time|a patient friend]. Can you wait?"
So {a} gave the seed a little water each day and waited. At last, one [misty|dewy|bright] morning, [a tiny
 green tip|one pale leaf] poked out of the ground. {yay} By the end of the summer, {a} had {result}. They made
 {feast} for [all the neighbors|all their friends]. "Waiting was the hard part," {Mom} said. {close}
# The gift | child animal | love gift = the sea/a picture frame covered with shells; birds/a bird feeder made
 from a milk carton; flowers/a crown of daisies and clover; stories/a little book with ten painted pages;
 tea/a cup with hand-painted tulips; the stars/a paper lantern with holes like stars; the forest/a necklace of
 acorns and red berries; the snow/a mobile of paper snowflakes; bright colors/a quilt of rainbow patches | buy
 = silver brooch; silk scarf; golden watch; crystal bowl; leather purse; music box; fancy umbrella; satin robe
 | lost = a peanut; a pencil stub; a hairpin; a ticket; a thimble; a domino; a zipper; a seashell; a toothpick
{open} The next day was {his} {mom}'s birthday, and {a} wished to give the [best|finest|loveliest] present of
 all. In a shop window, {he} saw a {buy}. It cost [twenty|thirty|fifty] coins! {a} had only [two|three|four].
First, {he} tried to sell lemonade, but [nobody was thirsty|a cloud burst and everyone ran home|the wasps
 drank most of it]. Then {he} [looked|hunted] for lost coins under the couch, but {he} only found {lost}.
 {sad} "The best presents come from the heart," said {his} {buddy}. "{Mom} loves {love}!" {a} cried. All
 afternoon, the two of them worked at the kitchen table with [paper|string|ribbon] and glue.
In the morning, {a} gave {Mom} a [lumpy|crooked] parcel tied with [yarn|a red bow]. Inside was {gift}.
 "[Nobody ever made me anything so lovely|This is the dearest present I ever got]," {Mom} said, wiping away a
 tear. {yay} The {buy} stayed in the shop, but nobody [missed|needed] it.
# The new face at school | child animal | topic = dragons; trains; whales; castles; rockets; pirates;
 dinosaurs; tigers; volcanoes; robots; lighthouses; unicorns; submarines; knights; planets; horses; camels;
 tractors; elephants; mermaids | snack = half a sandwich; some grapes; a slice of orange; a cookie; a handful
 of pretzels; a piece of cheese; a banana | game = tag; hide-and-seek; hopscotch; marbles; leapfrog; kickball
 | spot = beside the window; in the back row; near the door; next to the bookcase; by the fish tank
{open} One [Monday|Tuesday|Wednesday], a new {bboy} named {b} came to {his} class. {b} sat {spot} and [did
 not say a word|hardly looked up]. {a} felt sorry for {bhim} and wished to be {bhis} friend.
First, {a} waved, but {b} only looked down at {bhis} [desk|lap]. Then {a} offered {bhim} {snack}, but {b}
 shook {bhis} head. At recess, {a} asked, "Do you want to play {game}?" "No, thank you," {b}
 [whispered|mumbled]. {sad} But then {a} saw {b} drawing [in the dust with a stick|in a little notebook]. It
 was a [wonderful|splendid] picture of {topic}! {a} asked nothing, sat down, and began to draw {topic} too.
After a while, {b} [peeked|leaned] over. "You like {topic}?" {b} asked. "I love them," said {a}. "Will you
 show me how?" {b} [smiled for the first time|began to smile] and moved closer. They drew {topic} until the
 bell rang. {yay} The teacher hung their picture [on the wall|in the hallway]. On Friday, {b} even played
 {game} with everyone, and [from then on|after that], {a} and {b} were best friends.
# The rainy picnic | child animal | place = lake; waterfall; beach; old castle; wildflower meadow; windmill;
 lighthouse; vineyard | food1 = cheese sandwiches; egg rolls; potato salad; cucumber sandwiches; corn muffins;
 mushroom pie; spinach pancakes | food2 = strawberries; juicy pears; cold melon; blackberries; red apples;
 apricots; sweet cherries; pineapple | food3 = lemonade; ginger cookies; honey cake; cocoa; oatmeal cookies;
 mint tea; caramel pudding; gingerbread; vanilla custard; peppermint candy
{open} {One}, {he} wished to have a picnic at the {place}. {He} packed {food1}, {food2}, and {food3} and
 [fetched|invited] {his} {buddy}. But halfway there, the sky turned [gray|black], and it began to [rain|pour].
First, they [hid|dashed] under a leafy tree, but [cold|fat|icy] drops fell down their necks. Next, they
 opened an umbrella, but the wind [turned it inside out|snatched it away|broke it like a twig]. They ran home,
 [soaked|dripping] from head to toe. {sad} "No sun, no grass, no picnic," {a} [moaned|muttered]. {b} looked at
 the green rug on the floor. "This is our grass," {bhe} said {warmly}. "That lamp is our sun."
{a} began to giggle. They [made paper flowers|made trees out of chairs]. {yay} Then they ate the {food1} and
 the {food2} and finished with the {food3}, while the rain [drummed on the roof|tapped on the glass]. "[We
 made our own good weather|A picnic needs a friend more than it needs the sun]," said {a}. {close}
# Lost in the woods | child animal | lure = white butterfly; blue dragonfly; trail of mushrooms; green
 beetle; floating feather; line of ants | mark = crooked stump; split boulder; hollow oak; mossy well; fallen
 pine | guide sign way = owl/stream/flows right past your door; snail/smell of bread/comes from your own
 kitchen; woodpecker/sound of bells/comes from the tower near your home; toad/row of birches/leads straight to
 your garden; crow/smoke over there/rises from your chimney; bat/evening star/hangs right above your roof
{open} "Do not go into the woods alone," {his} {mom} always said. But {one}, {a} saw a {lure} and wished to
 see how far it would go. {He} followed it in among the trees, [deeper and deeper|farther and farther], until
 [the path was gone|every tree looked the same]. {a} was lost!
First, {a} turned left and walked and walked, until {he} came to a {mark}. Then {he} turned right and walked
 and walked, and there was the same {mark} again! "[Help|Hello]!" {he} called, but [nobody came|only an echo
 answered]. {sad} "Who is crying [down there|so late]?" asked a small voice. It was a {guide}. "[Do not run in
 circles|Stop running and look around you]," the {guide} said {warmly}. "Do you notice that {sign}? It {way}."
{a} stood still, and yes, {he} noticed it! {He} thanked the {guide} and went that way, [past thorns and
 nettles|through the ferns], until {he} saw [a lighted window|{his} own front door]. {yay} {Mom} [came
 running|was waiting] and hugged {him} tightly. "I will never go alone again," said {a}. The next day, they
 went into the woods together to leave [a crust of bread|some berries] beside the {mark} for the {guide}.
"""


def _read(block):
    """Read a block as {slot: (name of its list, texts)} and its paragraphs as one text."""
    slots, paragraphs = {}, []
    for line in block.strip().replace("\n ", " ").split("\n"):
        if " = " not in line:
            paragraphs.append(line)
            continue
        for entry in line.split(" | "):
            names, rows = entry.split(" = ")
            columns = zip(*(row.split("/") for row in rows.split("; ")), strict=True)
            slots |= {name: (names, texts) for name, texts in zip(names.split(), columns, strict=True)}
    return slots, "\n\n".join(paragraphs)


def _read_plots():
    """Read PLOTS as one list per plot, of its variants by cast and sex: (title, text, slots, lists shown)."""
    plots = []
    for block in PLOTS.strip("# \n").split("\n# "):
        title, casts, body = block.split(" | ", 2)
        own, text = _read(body)
        names = re.findall(r"{(\w+)}", BRACKET.sub("", text).lower())
        variants = []
        for cast in casts.split():
            for hero, friend in permutations(PEOPLE[cast]):
                people = HERO.format(*hero) + FRIEND.format(*friend)
                slots = _read(f"{COMMON}\n{CASTS[cast]}{people}")[0] | own
                variants.append((title, text, slots, sorted({slots[name][0] for name in names})))
        plots.append(variants)
    return plots


class _Words(dict):
    """The words of one story by slot name, each drawn when it is first needed."""

    def __init__(self, slots, below):
        self.slots, self.below, self.rows = slots, below, {}

    def fill(self, text, picks):
        """Take an option of every bracket, noting its number in picks, and fill in the slots."""

        def choose(match):
            options = match[1].split("|")
            picks.append(self.below(len(options)))
            return options[picks[-1]]

        return BRACKET.sub(choose, text).format_map(self)

    def __missing__(self, name):
        if name[0].isupper():
            word = self[name.lower()][0].upper() + self[name.lower()][1:]
        else:
            names, texts = self.slots[name]
            if names not in self.rows:
                self.rows[names] = self.below(len(texts))
            word = self.fill(texts[self.rows[names]], [])
        self[name] = word
        return word


def sample_stories(count: int, seed: int = 1) -> Iterator[str]:
    """Yield `count` distinct stories of three paragraphs; the k-th depends on `seed` alone, not on `count`.

    No story is a near copy of another: two stories of one plot differ in at least three separate choices.
    """
    rng = random.Random(seed)
    plots = _read_plots()

    def below(size):  # random() gives the same numbers on every platform and Python version
        return int(rng.random() * size)

    seen = set()
    while count > 0:
        variants = plots[below(len(plots))]
        title, text, slots, shown = variants[below(len(variants))]
        words, picks = _Words(slots, below), []
        story = words.fill(text, picks)
        # Deal the choices that every telling of the plot shows, which are the brackets and word lists of its
        # own text, into three hands, like cards. A story is kept only if all three hands are new, so two
        # stories of one plot differ in every hand: in three choices or more.
        choices = bytes(picks + [words.rows[names] for names in shown])
        hands = [(title, hand, choices[hand::3]) for hand in range(3)]
        if seen.isdisjoint(hands):
            seen.update(hands)
            count -= 1
            yield re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", story)
