"""English-German sentence pairs that need no download: the data of `make demo`.

A pair is a frame, an English and a German sentence of our own, with its slots filled: numbers in words (num2words),
dates, times, money, measures and names (Babel's CLDR) and a few words of ours. The frames are such that whatever
fills a slot is correct German without inflection.

    python -m training.embedded_data data/embedded
"""

import argparse
import os
import re
import tempfile
from collections.abc import Callable, Hashable, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from functools import lru_cache
from itertools import islice
from pathlib import Path
from random import Random

from babel import Locale, dates, numbers, units
from num2words import num2words


Pair = tuple[str, str]  # English, German
Filler = Callable[[Random], Pair]

ENGLISH, GERMAN = Locale("en", "US"), Locale("de", "DE")

# A line in English, the same in German. The slots are the keys of FILLERS.
FRAME_LINES = """
{event} in {territory} is on {date} at {time}.
{event} in {territory} findet am {date} um {time} Uhr statt.
{event} will not take place on {full_date} because only {count} {people} signed up.
{event} findet am {full_date} nicht statt, weil sich nur {count} {people} angemeldet haben.
We expect {count_de} {people} from {territory} on {day}.
Am {day} erwarten wir {count_de} {people} aus {territory}.
{organization} bought {count_de} {goods} for {money}.
{organization} hat für {money} {count_de} {goods} gekauft.
{person} sold {count_en} {goods} in {month} and earned {price}.
{person} hat im {month} {count_en} {goods} verkauft und {price} eingenommen.
{count_en} {people} traveled {route} last year.
Im letzten Jahr sind {count_en} {people} {route} gereist.
The train {route} leaves at {time} and takes {hours}.
Der Zug {route} fährt um {time} Uhr ab und braucht {hours}.
The population of {territory} grew by {percent} to {millions}.
Die Bevölkerung von {territory} ist um {percent} auf {millions} gewachsen.
In {territory}, {percent} of the population speak {language}.
In {territory} sprechen {percent} der Bevölkerung {language}.
The film from {territory} will be shown {place} in {language} on {weekday}.
Der Film aus {territory} wird am {weekday} {place} auf {language} gezeigt.
Please answer the letter of {date} in {language}.
Bitte beantworten Sie den Brief vom {date} auf {language}.
I do not know whether {person} has already paid the {money}.
Ich weiß nicht, ob {person} die {money} schon bezahlt hat.
{person} has been learning {language} for {years_de} years.
{person} lernt seit {years_de} Jahren {language}.
{person} is {years_de} years old and comes from {territory}.
{person} ist {years_de} Jahre alt und kommt aus {territory}.
{person} was born in {territory} on {date}.
{person} wurde am {date} in {territory} geboren.
{organization} was founded in {year_de} and now employs {count_en} people.
{organization} wurde im Jahr {year_de} gegründet und beschäftigt heute {count_en} Menschen.
The {ordinal} chapter explains the history of {territory} since {year_en}.
Das {ordinal} Kapitel erklärt die Geschichte von {territory} seit {year_en}.
{person} says that the {ordinal_de} question on page {count_en} is too difficult.
{person} sagt, dass die {ordinal_de} Frage auf Seite {count_en} zu schwierig ist.
The largest lake in {territory} is {meters} deep and {kilometers} long.
Der größte See in {territory} ist {meters} tief und {kilometers} lang.
The package weighs {kilograms} and was sent to {territory} {ago}.
Das Paket wiegt {kilograms} und wurde {ago} nach {territory} geschickt.
If it rains on {day}, {event} will take place {place}.
Wenn es am {day} regnet, findet {event} {place} statt.
{event} {place} begins {until}, but {person} is still in {territory}.
{event} {place} beginnt {until}, aber {person} ist noch in {territory}.
{person} has to pay {price} by {short_date}.
{person} muss bis zum {short_date} {price} bezahlen.
Your order of {count_en} {goods} was delivered to {territory} on {short_date}.
Ihre Bestellung über {count_en} {goods} wurde am {short_date} nach {territory} geliefert.
On {weekday}, {organization} is open until {time}.
Am {weekday} hat {organization} bis {time} Uhr geöffnet.
On {full_date}, the currency {currency} lost {percent} of its value.
Am {full_date} hat die Währung {currency} {percent} ihres Wertes verloren.
{organization} accepts payments from {territory} in the currency {currency}.
{organization} nimmt Zahlungen aus {territory} in der Währung {currency} an.
There are {count_de} {goods} {place}, but nobody needs them.
{place} gibt es {count_de} {goods}, aber niemand braucht sie.
{person} would like to count the {count} {goods} {place} again {until}.
{person} möchte {until} die {count} {goods} {place} noch einmal zählen.
{count} {people} waited {place} until {time} yesterday.
Gestern haben {count} {people} bis {time} Uhr {place} gewartet.
More than {thousands} {people} came to {territory} in {month}.
Im {month} sind mehr als {thousands} {people} nach {territory} gekommen.
Although {person} already owns {count_de} {goods}, more were delivered on {weekday}.
Obwohl {person} schon {count_de} {goods} besitzt, wurden am {weekday} weitere geliefert.
Did you know that {person} visited {territory} {ago}?
Wussten Sie, dass {person} {ago} {territory} besucht hat?
How many {goods} did {organization} sell in {territory} in {year_en}?
Wie viele {goods} hat {organization} {year_en} in {territory} verkauft?
The price of the {goods} rose by {percent} to {money}.
Der Preis der {goods} ist um {percent} auf {money} gestiegen.
{person} will fly {route} on {full_date} because {event} begins there.
{person} fliegt am {full_date} {route}, weil dort {event} beginnt.
""".strip().split("\n")
FRAMES = list(zip(FRAME_LINES[::2], FRAME_LINES[1::2], strict=True))

# The German phrases are nominative; the plural ones without an article are accusative and genitive just as well.
WORDS = {
    "event": """the meeting = das Treffen, the concert = das Konzert, the exhibition = die Ausstellung,
        the course = der Kurs, the festival = das Fest, the guided tour = die Führung, the lecture = der Vortrag""",
    "goods": """books = Bücher, chairs = Stühle, tables = Tische, bicycles = Fahrräder, tickets = Eintrittskarten,
        computers = Computer, paintings = Gemälde, trees = Bäume, flowers = Blumen, lamps = Lampen, clocks = Uhren,
        windows = Fenster, maps = Landkarten, coats = Mäntel, cups = Tassen, bottles = Flaschen, boxes = Kisten""",
    "organization": """the museum = das Museum, our company = unsere Firma, the hospital = das Krankenhaus,
        the bakery = die Bäckerei, the bookstore = die Buchhandlung, the publisher = der Verlag""",
    "people": """guests = Gäste, athletes = Sportler, tourists = Touristen, volunteers = Freiwillige, cooks = Köche,
        doctors = Ärzte, musicians = Musiker, gardeners = Gärtner, journalists = Journalisten""",
    "person": """the engineer = die Ingenieurin, the teacher = der Lehrer, my sister = meine Schwester,
        her neighbor = ihr Nachbar, the farmer = der Bauer, the young doctor = die junge Ärztin, our cook = unser Koch,
        the old captain = der alte Kapitän, my grandfather = mein Großvater, the violinist = die Geigerin""",
    "place": """in the library = in der Bibliothek, at the airport = am Flughafen, at the station = am Bahnhof,
        in the old town hall = im alten Rathaus, at the harbor = im Hafen, in the market square = auf dem Marktplatz,
        in the theater = im Theater, in the main hall = im großen Saal, on the ground floor = im Erdgeschoss""",
}


def names(kind: str, codes: str) -> list[Pair]:
    return [(getattr(ENGLISH, kind)[code], getattr(GERMAN, kind)[code]) for code in codes.split()]


# Only names that German uses without an article.
TERRITORIES = names(
    "territories",
    "AL DZ AR AM AU AT AZ BD BE BO BR BG KH CM CA CL CN CO CR HR CU CY DK EC EG EE ET FI FR GE DE GH GR GT HN HU IS "
    "IN ID IE IL IT JM JP JO KZ KE LV LT MG MY MT MX MA MZ NA NP NZ NI NG NO PK PA PE PL PT RO RW RS SG SI ES SE TZ "
    "TH TN UG UY VE VN ZM ZW ZA KR",
)
LANGUAGES = "ar bg cs da de el en es et fa fi fr he hu hy is it ja ko lt lv nl no pl pt ro ru sv sw tr uk vi zh"
CURRENCIES = "EUR USD GBP JPY CHF CAD AUD SEK NOK DKK PLN CZK HUF INR BRL MXN ZAR TRY KRW"

# Mostly small; never 201, 301, …, because "zweihunderteins Bücher" is doubtful German.
COUNTS = 20 * [*range(2, 101)] + [number for number in range(102, 1000) if number % 100 != 1]
YEARS = range(1950, 2030)
DATES = [date(1950, 1, 1) + timedelta(days=days) for days in range(80 * 365)]
TIMES = [time(hour, minute) for hour in range(7, 23) for minute in range(0, 60, 5)]
DELAYS = [timedelta(days=unit * n) for unit, most in ((1, 5), (7, 3), (30, 10), (365, 9)) for n in range(2, most + 1)]
AMOUNTS = [Decimal(f"{whole}.{cents}") for whole in (*range(2, 100), *range(100, 5000, 50)) for cents in (0, 50, 95)]


@lru_cache(maxsize=1 << 16)
def in_both(render: Callable[..., str], *values: Hashable, **options: Hashable) -> Pair:
    return render(*values, locale=ENGLISH, **options), render(*values, locale=GERMAN, **options)


@lru_cache(maxsize=1 << 16)
def write_number(number: int, form: str, language: str) -> str:
    return str(number) if form == "digits" else num2words(number, to=form, lang=language)


def cldr(render: Callable[..., str], *choices: Sequence[Hashable], **options: Hashable) -> Filler:
    """Makes Babel's `render` write, in both languages, one value drawn from each of its arguments' choices."""
    return lambda rng: in_both(render, *(rng.choice(values) for values in choices), **options)


def number(choices: Sequence[int], english_form: str, german_form: str) -> Filler:
    """Writes a number drawn from the choices; a form is "digits" or one of num2words'."""

    def filler(rng: Random) -> Pair:
        drawn = rng.choice(choices)
        return write_number(drawn, english_form, "en"), write_number(drawn, german_form, "de")

    return filler


def one_of(pairs: Sequence[Pair]) -> Filler:
    return lambda rng: rng.choice(pairs)


def route(rng: Random) -> Pair:
    start, end = rng.sample(TERRITORIES, 2)
    return f"from {start[0]} to {end[0]}", f"von {start[1]} nach {end[1]}"


# The endings _en and _de name the one language that writes the number in words.
FILLERS: dict[str, Filler] = {
    **{slot: one_of([tuple(pair.split(" = ")) for pair in re.split(r",\s+", text)]) for slot, text in WORDS.items()},
    "territory": one_of(TERRITORIES),
    "route": route,
    "language": one_of(names("languages", LANGUAGES)),
    "currency": one_of(names("currencies", CURRENCIES)),
    "count": number(COUNTS, "cardinal", "cardinal"),
    "count_en": number(COUNTS, "cardinal", "digits"),
    "count_de": number(COUNTS, "digits", "cardinal"),
    "ordinal": number(range(1, 100), "ordinal", "ordinal"),
    "ordinal_de": number(range(1, 100), "ordinal_num", "ordinal"),
    "years_de": number(range(2, 101), "digits", "cardinal"),
    "year_en": number(YEARS, "year", "digits"),
    "year_de": number(YEARS, "digits", "year"),
    "date": cldr(dates.format_date, DATES, format="long"),
    "full_date": cldr(dates.format_date, DATES, format="full"),
    "short_date": cldr(dates.format_date, DATES, format="medium"),
    "weekday": cldr(dates.format_date, DATES, format="EEEE"),
    "month": cldr(dates.format_date, DATES, format="LLLL"),
    "day": cldr(dates.format_skeleton, ["MMMMd"], DATES),
    "time": cldr(dates.format_time, TIMES, format="short"),
    "ago": cldr(dates.format_timedelta, [-delay for delay in DELAYS], add_direction=True),
    "until": cldr(dates.format_timedelta, DELAYS, add_direction=True),
    "money": cldr(numbers.format_currency, AMOUNTS, ["EUR", "USD", "GBP", "JPY"]),
    "price": cldr(numbers.format_currency, AMOUNTS, CURRENCIES.split(), format_type="name"),
    "percent": cldr(numbers.format_percent, [n / 1000 for n in range(1, 1000)], decimal_quantization=False),
    "thousands": cldr(numbers.format_decimal, range(1000, 100_000, 100)),
    "millions": cldr(
        numbers.format_compact_decimal, range(2_000_000, 90_000_000, 100_000), format_type="long", fraction_digits=1
    ),
    "hours": cldr(units.format_unit, [n / 2 for n in range(4, 25)], measurement_unit="duration-hour"),
    "kilograms": cldr(units.format_unit, [n / 2 for n in range(4, 100)], measurement_unit="mass-kilogram"),
    "kilometers": cldr(units.format_unit, range(20, 2000), measurement_unit="length-kilometer"),
    "meters": cldr(units.format_unit, range(20, 2000), measurement_unit="length-meter"),
}


def fill(frame: Pair, rng: Random) -> Pair:
    fillings = {slot: FILLERS[slot](rng) for slot in re.findall(r"{(\w+)}", frame[0])}
    english, german = (frame[side].format_map({slot: f[side] for slot, f in fillings.items()}) for side in (0, 1))
    return finish(english), finish(german)


def finish(sentence: str) -> str:
    """Capitalises the first letter and makes CLDR's non-breaking spaces plain."""
    return " ".join((sentence[0].upper() + sentence[1:]).split())


def generate_pairs(count: int, seed: int) -> list[Pair]:
    """Generates English-German sentence pairs that share no sentence.

    The same arguments and the same versions of Babel and num2words give the same pairs anywhere; a higher count only
    appends to them.
    """
    rng = Random(seed)
    pairs: list[Pair] = []
    seen: set[str] = set()
    while len(pairs) < count:
        pair = fill(rng.choice(FRAMES), rng)
        if seen.isdisjoint(pair):
            seen.update(pair)
            pairs.append(pair)
    return pairs


def write_embedded_data(
    directory: str | os.PathLike[str], train: int = 20000, validation: int = 500, test: int = 500, seed: int = 1
) -> None:
    """Writes train.en, train.de, validation.en, … as UTF-8 with one sentence a line; each file appears whole.

    The directory is made if it is missing. The validation and the test pairs do not depend on how many train.
    """
    pairs = iter(generate_pairs(test + validation + train, seed))
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as temporary:
        for split, count in (("test", test), ("validation", validation), ("train", train)):
            split_pairs = list(islice(pairs, count))
            for side, language in enumerate(("en", "de")):
                text = "".join(f"{pair[side]}\n" for pair in split_pairs)
                Path(temporary, f"{split}.{language}").write_text(text, encoding="utf-8", newline="\n")
        for file in sorted(Path(temporary).iterdir()):
            file.replace(directory / file.name)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.embedded_data",
        description="Generate English-German text: {train,validation,test}.{en,de}, one sentence a line.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("directory", metavar="DIR", help="where to write the six files; made if missing")
    for split, count in (("train", 20000), ("validation", 500), ("test", 500)):
        parser.add_argument(f"--{split}", type=int, default=count, metavar="N", help=f"pairs in the {split} set")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="the same seed gives the same files")
    options = parser.parse_args()
    write_embedded_data(**vars(options))
    print(f"Wrote {options.train} + {options.validation} + {options.test} pairs to {options.directory}")


if __name__ == "__main__":
    main()
