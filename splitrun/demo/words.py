"""The fixed list of words that the demo's letter tasks use, and the English names of numbers and weekdays.

Pure data and spelling; does not know the tasks.
"""

_LIST = """\
able acid actor after again agent air alarm album alley amber angle animal answer ant apple apron arch arm army
arrow art aunt autumn baby back bacon badge bag baker ball banana band bank barn basin basket bath beach beak bean
bear bed bee bell belt bench berry bike bird biscuit black blanket block blue board boat body bone book boot border
bottle bowl box brain branch brass bread brick bridge brother brown brush bubble bucket build bus butter button
cabin cable cake camel camera camp candle canoe canvas cap captain car carbon card carpet carrot castle cat cave
cellar center chain chair chalk cheese cherry chess chest chicken circle circus city clay clock cloud coal coast
coat coconut coffee coin comb compass cook copper coral corn corner cotton cousin cow crab crane cream cricket crown
cup curtain cushion dance danger day deer desert desk dinner dog doll dolphin donkey door dragon drawer dream dress
drum duck eagle ear earth east echo egg elbow elephant emerald engine evening eye fabric face factory family farm
feather fence field finger fire fish flag flame flower flute fog forest fork fox friend frog fruit galaxy garden
garlic gate giant ginger giraffe glass glove goat gold goose grape grass green guitar hammer hand harbor hat hawk
heart hedge helmet hen hill honey hook horse hospital hotel house ice ink iron island jacket jar jelly jewel jungle
kettle key king kitchen kite kitten knee knife ladder lake lamp lantern leaf leather lemon letter library light
lily lion lizard lock lunch magnet mango maple marble market mask meadow melon metal milk mill minute mirror money
monkey moon morning mother mountain mouse museum mushroom music nail napkin neck needle nest night north nose
notebook number nut oak ocean office olive onion orange orchard otter oven owl paint palace panda paper parade park
parrot path peach peanut pear pebble pen pencil penguin pepper piano picnic picture pig pigeon pillow pilot pine
pirate planet plate pocket poem pond potato pumpkin puzzle queen rabbit radio rain raven ribbon rice ring river
road robin robot rocket roof room root rope rose ruby saddle sail salad salt sand scarf school sea season seed
shadow sheep shelf shell shirt shoe silver sister sky sleep snail snow soap sock soup south spider spoon spring
squirrel stamp star station stone storm street student sugar summer sun swan sweater table tail tea teacher tent
thumb tiger tomato tooth towel tower town toy tractor train tree triangle trumpet tulip tunnel turtle umbrella
valley vase velvet village violin voice wagon wall walnut water wave weather west whale wheat wheel whistle window
winter wolf wood wool world yard year yellow zebra
"""
WORDS = tuple(_LIST.split())

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

_TEENS = "thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_BELOW_TWENTY = f"zero one two three four five six seven eight nine ten eleven twelve {_TEENS}".split()
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def spell_number(number: int) -> str:
    """Spell `number`, 0 to 999, in English words: 207 is "two hundred seven", 42 is "forty-two"."""
    if not 0 <= number <= 999:
        raise ValueError(f"cannot spell {number}: only 0 to 999 are known")
    if number < 20:
        return _BELOW_TWENTY[number]
    if number < 100:
        ten, one = divmod(number, 10)
        return _TENS[ten - 2] + (f"-{_BELOW_TWENTY[one]}" if one else "")
    hundred, rest = divmod(number, 100)
    return f"{_BELOW_TWENTY[hundred]} hundred" + (f" {spell_number(rest)}" if rest else "")
