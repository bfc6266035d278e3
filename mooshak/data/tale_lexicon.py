"""The words of the tales: nouns, names, adjectives and phrases in English and Hindi, declined.

Every table is read once, at import. A noun's line is `english | hindi | gender | tags`; the Hindi
case forms follow from the ending and the gender (`decline`), and what the rule cannot know stands
in the line: `mouse/mice` is an irregular plural, `m inv` a masculine noun in -ā that never changes
(राजा), `hon` a respected person, who takes plural agreement.
"""

ANIMALS = """
mouse/mice  | चूहा       | m | animal beast small ground gnawer
squirrel    | गिलहरी     | f | animal beast small ground gnawer climber
rabbit      | खरगोश      | m | animal beast small ground gnawer fast
cat         | बिल्ली      | f | animal beast small ground pet
puppy       | पिल्ला      | m | animal beast small ground young pet
lamb        | मेमना       | m | animal beast small ground young
calf/calves | बछड़ा       | m | animal beast ground young
goat        | बकरी       | f | animal beast ground farm
sheep/sheep | भेड़        | f | animal beast ground farm
dog         | कुत्ता      | m | animal beast ground farm pet fast
mongoose    | नेवला       | m | animal beast small ground
donkey      | गधा        | m | animal beast big ground farm
cow         | गाय        | f | animal beast big ground farm
buffalo/buffaloes | भैंस  | f | animal beast big ground farm
horse       | घोड़ा       | m | animal beast big ground farm fast
camel       | ऊँट        | m | animal beast big ground
elephant    | हाथी       | m | animal beast big ground strong
bear        | भालू       | m | animal beast big ground strong
bull        | बैल        | m | animal beast big ground strong farm
deer/deer   | हिरन       | m | animal beast ground fast
monkey      | बंदर       | m | animal beast climber ground clever
fox         | लोमड़ी      | f | animal beast ground sly clever
jackal      | सियार      | m | animal beast ground sly
wolf/wolves | भेड़िया     | m | animal beast sly predator
lion        | शेर        | m | animal beast big predator mighty
tiger       | बाघ        | m | animal beast big predator mighty
leopard     | तेंदुआ      | m | animal beast big predator mighty
crocodile   | मगरमच्छ     | m | animal watery lurker
turtle      | कछुआ       | m | animal slow swimmer
snail       | घोंघा       | m | animal slow tiny
frog        | मेंढक       | m | animal small swimmer
crab        | केकड़ा      | m | animal watery
fish/fish   | मछली       | f | animal watery
duck        | बत्तख      | f | animal bird swimmer
swan        | हंस        | m | animal bird swimmer
sparrow     | गौरैया      | f | animal bird flier songbird small
parrot      | तोता       | m | animal bird flier songbird small
crow        | कौआ        | m | animal bird flier small
pigeon      | कबूतर      | m | animal bird flier songbird small
cuckoo      | कोयल       | f | animal bird flier songbird small
myna        | मैना       | f | animal bird flier songbird small
woodpecker  | कठफोड़वा    | m | animal bird flier small
heron       | बगुला       | m | animal bird
crane       | सारस       | m | animal bird
peacock     | मोर        | m | animal bird
hen         | मुर्गी      | f | animal bird farm
owl         | उल्लू      | m | animal bird wise
eagle       | चील        | f | animal bird flier
ant         | चींटी      | f | animal insect tiny worker
bee         | मधुमक्खी    | f | animal insect tiny worker
butterfly   | तितली      | f | animal insect tiny idler
grasshopper | टिड्डा      | m | animal insect tiny idler
cricket     | झींगुर     | m | animal insect tiny idler
firefly     | जुगनू      | m | animal insect tiny
spider      | मकड़ी      | f | animal tiny
"""

PEOPLE = """
farmer      | किसान      | m | adult villager
potter      | कुम्हार     | m | adult villager craftsman
weaver      | बुनकर      | m | adult villager craftsman
tailor      | दर्ज़ी      | m | adult villager craftsman
carpenter   | बढ़ई       | m | adult villager craftsman
blacksmith  | लोहार      | m | adult villager craftsman
washerman/washermen | धोबी | m | adult villager
gardener    | माली       | m | adult villager
fisherman/fishermen | मछुआरा | m | adult villager
woodcutter  | लकड़हारा    | m | adult villager
milkman/milkmen | ग्वाला  | m | adult villager
boatman/boatmen | मल्लाह  | m | adult villager
merchant    | व्यापारी    | m | adult rich
landlord    | ज़मींदार    | m | adult rich
jeweller    | जौहरी      | m | adult rich
hunter      | शिकारी      | m | adult hunter
thief/thieves | चोर      | m | rogue
old woman/old women | बुढ़िया | f | aged
old man/old men | बूढ़ा आदमी | m | aged
king        | राजा       | m inv hon | royal
queen       | रानी       | f hon | royal
grandfather | दादाजी     | m hon | elder
grandmother | दादी       | f hon | elder
mother      | माँ        | f hon | parent
father      | पिताजी     | m hon | parent
boy         | लड़का      | m | person
girl        | लड़की      | f | person
"""

THINGS = """
ring      | अँगूठी    | f | thing keepsake shiny
bell      | घंटी      | f | thing keepsake shiny
key       | चाबी      | f | thing keepsake shiny
coin      | सिक्का     | m | thing keepsake shiny
necklace  | हार       | m | thing keepsake shiny
bangle    | कंगन      | m | thing keepsake shiny
ball      | गेंद      | f | thing keepsake toy
doll      | गुड़िया    | f | thing keepsake toy
top       | लट्टू     | m | thing keepsake toy
toy       | खिलौना     | m | thing keepsake toy
toy cart  | खिलौना-गाड़ी | f | thing toy
whistle   | सीटी      | f | thing keepsake toy
cap       | टोपी      | f | thing keepsake gift cloth
scarf/scarves | दुपट्टा | m | thing gift cloth
shawl     | चादर      | f | thing gift cloth
blanket   | कंबल      | m | thing gift cloth
shirt     | कुर्ता     | m | thing gift cloth
bag       | थैला      | m | thing gift
basket    | टोकरी     | f | thing gift
mat       | चटाई      | f | thing gift
lamp      | दीया      | m | thing gift
mirror    | आईना      | m | thing gift
book      | किताब     | f | thing keepsake gift school
pencil    | पेंसिल    | f | thing school
notebook  | कॉपी      | f | thing school
slate     | तख्ती     | f | thing school
umbrella  | छाता      | m | thing gift
flute     | बाँसुरी    | f | instrument
drum      | ढोल       | m | instrument
sitar     | सितार     | m | instrument
veena     | वीणा      | f | instrument
tabla     | तबला      | m | instrument
kite      | पतंग      | f | flying
balloon   | गुब्बारा   | m | flying
axe       | कुल्हाड़ी  | f | tool
hammer    | हथौड़ा     | m | tool
sickle    | हँसिया     | m | tool
spade     | फावड़ा     | m | tool
saw       | आरी       | f | tool
pot       | घड़ा      | m | vessel breakable
jug       | सुराही     | f | vessel breakable
bucket    | बाल्टी     | f | vessel
jar       | मटका      | m | vessel breakable
cup       | प्याला     | m | breakable
plate     | थाली      | f | thing gift
box       | डिब्बा     | m | thing gift
feather   | पंख       | m | light
leaf/leaves | पत्ता    | m | light
rose      | गुलाब     | m | flower
marigold  | गेंदा      | m | flower
sunflower | सूरजमुखी  | m | flower
lotus     | कमल       | m | waterflower
"""

FOODS = """
mango/mangoes | आम       | m | food fruit high
banana        | केला     | m | food fruit high
apple         | सेब      | m | food fruit high
guava         | अमरूद    | m | food fruit high
orange        | संतरा    | m | food fruit high
pear          | नाशपाती  | f | food fruit high
melon         | खरबूजा   | m | food crop
pumpkin       | कद्दू    | m | food crop
cucumber      | खीरा     | m | food crop
carrot        | गाजर     | f | food crop
radish        | मूली     | f | food crop
potato/potatoes | आलू    | m | food crop
tomato/tomatoes | टमाटर  | m | food crop
corn cob      | भुट्टा    | m | food crop
walnut        | अखरोट    | m | food nut
peanut        | मूँगफली   | f | food nut
flatbread     | रोटी     | f | food baked
laddu         | लड्डू    | m | food baked sweet
jalebi        | जलेबी    | f | food baked sweet
puri          | पूरी     | f | food baked
samosa        | समोसा    | m | food baked
"""

# The tags after the bar end with `english preposition=हिंदी परसर्ग`: how one stands at the place.
PLACES = """
forest   | जंगल    | m | place wild woody       in=में
valley   | घाटी    | f | place wild             in=में
hill     | पहाड़ी   | f | place wild             on=पर
meadow   | मैदान   | m | place wild             in=में
orchard  | बाग     | m | place wild woody       in=में
river    | नदी     | f | place wild water flow  by=के किनारे
pond     | तालाब   | m | place wild water still by=के किनारे
lake     | झील     | f | place wild water still by=के किनारे
stream   | झरना    | m | place wild water flow  by=के पास
village  | गाँव    | m | place home             in=में
town     | नगर     | m | place home             in=में
garden   | बगीचा   | m | place yard             in=में
field    | खेत     | m | place yard             in=में
courtyard | आँगन   | m | place yard             in=में
market   | बाज़ार   | m | place busy             in=में
fair     | मेला    | m | place busy             at=में
bush     | झाड़ी    | f | nook                   in=में
cave     | गुफा    | f | nook                   in=में
neem tree   | नीम का पेड़   | m | tree           in=पर
banyan tree | बरगद का पेड़  | m | tree           in=पर
mango tree  | आम का पेड़    | m | tree           in=पर
guava tree  | अमरूद का पेड़ | m | tree           in=पर
"""

GIRLS = """Meenu मीनू, Radha राधा, Gita गीता, Sita सीता, Asha आशा, Lata लता, Pooja पूजा, Rani रानी,
Kamla कमला, Neha नेहा, Tara तारा, Uma उमा, Mira मीरा, Jyoti ज्योति, Nisha निशा, Kavita कविता,
Mala माला, Sona सोना, Chanda चंदा, Bela बेला, Rekha रेखा, Anu अनु, Gauri गौरी, Pari परी"""

BOYS = """Raju राजू, Mohan मोहन, Gopal गोपाल, Ravi रवि, Amit अमित, Arjun अर्जुन, Kishan किशन,
Vijay विजय, Golu गोलू, Chintu चिंटू, Sonu सोनू, Deepak दीपक, Hari हरि, Ramu रामू, Bablu बबलू, Nandu नंदू,
Suraj सूरज, Manoj मनोज, Anand आनंद, Kabir कबीर, Birju बिरजू, Motu मोटू, Chiku चीकू, Tinku टिंकू"""

ADJECTIVES = {
    "trait": "kind दयालु, clever चतुर, brave बहादुर, honest ईमानदार, cheerful हँसमुख, little छोटा, "
    "hardworking मेहनती, good अच्छा, lovely प्यारा, gentle कोमल, tiny नन्हा, thin दुबला",
    "virtue": "kind दयालु, clever चतुर, brave बहादुर, honest ईमानदार, cheerful हँसमुख, good नेक, "
    "hardworking मेहनती, wise समझदार, simple सीधा-सादा",
    "reign": "kind दयालु, wise समझदार, fair न्यायप्रिय, good नेक, brave बहादुर, rich धनी",
    "colour": "red लाल, blue नीला, yellow पीला, green हरा, white सफ़ेद, black काला, pink गुलाबी, "
    "golden सुनहरा, brown भूरा, orange नारंगी, purple बैंगनी",
    "look": "small छोटा, big बड़ा, old पुराना, new नया, beautiful सुंदर, shiny चमकीला, nice अच्छा, "
    "red लाल, blue नीला, yellow पीला, green हरा, white सफ़ेद, pink गुलाबी, golden सुनहरा",
    "taste": "sweet मीठा, fresh ताज़ा, big बड़ा, small छोटा, tasty स्वादिष्ट, round गोल, nice अच्छा",
    "nature": "big बड़ा, small छोटा, beautiful सुंदर, quiet शांत, green हरा-भरा, old पुराना, "
    "lovely प्यारा, distant दूर का",
    "fault": "lazy आलसी, proud घमंडी, greedy लालची, selfish स्वार्थी, naughty शरारती",
    "might": "big बड़ा, strong ताकतवर, fat मोटा, huge विशाल, tall ऊँचा",
}
ADJECTIVES["nature"] = (
    ADJECTIVES["nature"].replace(", distant दूर का", "").replace(", green हरा-भरा", "")
)

NUMBERS = "two दो, three तीन, four चार, five पाँच, six छह, seven सात, eight आठ, nine नौ, ten दस"

PHRASES = {
    "when": "one day = एक दिन; one morning = एक सुबह; one evening = एक शाम; "
    "one afternoon = एक दोपहर; one cold morning = एक ठंडी सुबह; one summer day = गर्मी के एक दिन; "
    "one winter morning = सर्दी की एक सुबह; one spring morning = वसंत की एक सुबह; "
    "one sunny day = एक सुहाने दिन; one Sunday = एक रविवार को",
    "night": "one night = एक रात; one dark night = एक अँधेरी रात; one cold night = एक ठंडी रात; "
    "one winter night = सर्दी की एक रात; late one night = एक दिन देर रात; "
    "one quiet night = एक शांत रात",
    "storm": "a strong wind = तेज़ हवा; a great storm = भारी तूफ़ान; a cold wind = ठंडी हवा",
    "later": "a few days later = कुछ दिन बाद; the next day = अगले दिन; one week later = एक हफ़्ते बाद; "
    "some time later = कुछ समय बाद; after two days = दो दिन बाद; a month later = एक महीने बाद",
    "soon": "soon = जल्दी ही; after a while = थोड़ी देर बाद; just then = तभी; "
    "at that moment = उसी समय; in a little while = कुछ ही देर में",
}
