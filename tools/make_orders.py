"""Write examples/orders/{train,heldout}.jsonl: everyday orders and the JSON record each one means.

    python tools/make_orders.py [FOLDER]

Same files on every run and machine: one seeded generator, nothing read from outside. The held-out
rows share items, colours, numbers and days with the training rows (a shop knows its own goods), but
their names, cities and sentence patterns occur nowhere in training, so a model scores on them only
if it learned the task and not the sentences. Held-out names and cities are such that SmolLM2's
tokenizer writes them in the same pieces after a space and after a quote: the task is copying what
was said, not knowing how a token is spelled.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

SEED = 2024
NUM_TRAIN, NUM_HELD_OUT = 1000, 100
FOLDER = Path(__file__).resolve().parent.parent / "examples" / "orders"

SYSTEM = "Turn the order into one JSON record."
KEYS = ("item", "colour", "quantity", "name", "city", "due")

# singular -> plural
ITEMS = {
    "mug": "mugs",
    "lamp": "lamps",
    "chair": "chairs",
    "scarf": "scarves",
    "notebook": "notebooks",
    "bicycle": "bicycles",
    "candle": "candles",
    "shelf": "shelves",
    "umbrella": "umbrellas",
    "box": "boxes",
    "blanket": "blankets",
    "kettle": "kettles",
    "brush": "brushes",
    "pillow": "pillows",
    "basket": "baskets",
    "knife": "knives",
    "vase": "vases",
    "bottle": "bottles",
    "jacket": "jackets",
    "backpack": "backpacks",
}
COLOURS = "red blue green yellow black white grey brown orange purple pink silver".split()
NUMBERS = "one two three four five six seven eight nine ten eleven twelve".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday tomorrow".split()

# {what} is "three red mugs", {due} is "" or " before Friday" and the like.
TRAIN_PATTERNS = (
    "Please send {what} to {name} in {city}{due}.",
    "Send {what} to {name} in {city}{due}, please.",
    "I would like to order {what} for {name} in {city}{due}.",
    "{name} in {city} needs {what}{due}.",
    "{name} from {city} wants {what}{due}.",
    "Can you ship {what} to {city} for {name}{due}?",
    "We need {what} in {city}{due}. The name is {name}.",
    "Hello, my name is {name}. I want {what} sent to {city}{due}.",
    "Order for {name}: {what}, to {city}{due}.",
    "To {city}{due}: {what} for {name}.",
    "{what}, please, for {name} in {city}{due}.",
    "Could {name} in {city} have {what}{due}?",
    "Get {what} to {name}, who lives in {city}{due}.",
    "This is {name}, calling from {city}. I need {what}{due}.",
    "Hi! {name} here, from {city}. Please put {what} in the post{due}.",
    "A customer called {name} ordered {what}. Deliver to {city}{due}.",
    "Our office in {city} is short of {what}. Ask for {name}. Deliver{due}.",
    "Deliver {what} to {city}{due}. It is a gift for {name}.",
    "My friend {name} moved to {city} and asked for {what}{due}.",
    "Put down {what} for {name}; the parcel goes to {city}{due}.",
    "Add to the list: {name}, {city}, {what}{due}.",
    "I promised {name} {what}. Bring the parcel to {city}{due}.",
    "The shop in {city} ran out, so send {what}{due}. Contact: {name}.",
    "How soon can you bring {what} to {city}? {name} is waiting{due}.",
    "In {city}, {name} is out of {what}{due}.",
    "{city} called: {name} has to get {what}{due}.",
    "{city}: {what} for {name}{due}.",
    "From {city} comes an order by {name} for {what}{due}.",
    "Down in {city} there is {name}, hoping for {what}{due}.",
    "{name} ({city}) asks for {what}{due}.",
    "Please note: {name} of {city} takes {what}{due}.",
    "The {city} branch wants {what}{due}. {name} will sign for it.",
)
HELD_OUT_PATTERNS = (
    "Kindly mail {what} to {name} over in {city}{due}.",
    "{name} would love {what}. Ship everything to {city}{due}.",
    "Good morning, this is {name} and I live in {city}. Please reserve {what} for me{due}.",
    "Is it possible to have {what} brought to {city}{due}? They are meant for {name}.",
    "Pack {what} for {name} and post the parcel to {city}{due}.",
    "New request from {city}: {name} is asking for {what}{due}.",
    "My sister {name} is staying in {city} and could use {what}{due}.",
    "Let us get {what} on the road to {city}{due}. Hand them to {name}.",
    "For {name}, our neighbour in {city}: {what}{due}.",
    "{city} is where {name} expects {what}{due}.",
)
TRAIN_DUES = (" before {}", " by {}", " not later than {}", ", at the latest {}")
HELD_OUT_DUES = (" before {}", " by {}", ", no later than {}")

TRAIN_NAMES = (
    "Anna Ben Carla David Elena Felix Grace Hugo Irene Jonas Katya Liam Marta Nils Olga Pedro "
    "Quinn Rosa Samuel Tara Umar Vera Walter Xenia Yusuf Zoe Aisha Bruno Chloe Dmitri Emma "
    "Farid Gloria Henrik Ingrid Jamal Karin Luca Mei Noah Otto Petra Rafael Sofia Tomas "
    "Ursula Victor Wanda Yara Zachary Amina Boris Celine Diego Esther Fatima George Hannah "
    "Igor Julia Kenji Leila Mario Nadia Oscar Paula Ravi Sarah Theo Valeria William Yuki "
    "Alice Bjorn Clara Daniel Erik Fiona Giulia Hassan Isabel Jack Kira Lena Miguel Nora Omar "
    "Priya Robert Selma Tariq Viktor Agnes Carlos Doris Edgar Frida Gustav Helen Ivan Joanna "
    "Kofi Lucy Martin Nina Owen Rita Stefan Teresa Arthur Bella Anton Beata Cecilia Damian "
    "Elsa Florian Greta Hector Iris Joel Klara Lorenzo Monika Nikolai Olivia Philip Regina "
    "Simon Tatiana Uwe Vincent Wendy Ximena Yolanda Zara Adrian Bianca Caspar Daria Elias "
    "Fabian Georgia Harald Ines Jerome Katrin Ludwig Marcus Natalia Patricia Quentin Roland "
    "Sabine Thomas Valentin Winston Yasmin Alfred Beatrice Cedric Dominic Eleanor Ferdinand "
    "Gregor Harriet Isaac Jessica Konrad Lydia Matthias Nathan Ophelia Phoebe Rosalind "
    "Sebastian Timothy Vanessa Wesley Andrea Barbara Christopher Dorothy Elisabeth Francesca "
    "Gabriel Heather Irina Jacob Kimberly Lorraine Madeleine Norbert Oksana Penelope Reginald "
    "Stephanie Tobias Veronika Wolfgang Akira Chandra Deepak Farah Hiroshi Indira Jorge "
    "Khalid Lakshmi Mustafa Nasser Rashid Suresh Takeshi Zainab Mirko Pavel Radka Zdenek "
    "Ludmila Agata Kasia Piotr Sanna Timo Aino Bente Torsten Delphine Freya Hilda Jasper "
    "Kamala Mirjam Nestor Ramona Thelma Ulrich Wilma Zelda Brigitte Dalia Everett Cordula "
    "Benedikt Solveig Ottilie Merle Leopold Hedwig Gunnar Isolde Ragnar Rupert Silvio Tilda "
    "Vidar Wencke Ylva Amalia Bettina Dagmar Eugenia Fredrik Hamish Jolanda Kelvin Mathilda "
    "Nikita Oswald Roderick Thandi Vilma Winona Zubair Bashir Camilla Elvira Fergus Gemma "
    "Hakan Janina Kerstin Lars Malin Orla Rosanna Sibylle Tessa Valentino Wilfred Cyrus "
    "Leonard Pascal Abdul Connor"
).split()
HELD_OUT_NAMES = (
    "Astrid Emil Gerard Imran Odette Sven Violet Yannick Ingmar Jorinde Sigrid Tamsin Ulla "
    "Xaver Zora Cosima Gideon Ilona Linnea Perla Svetlana Ursel Yngve Ambrose Desmond Ismail "
    "Noemi Pauline Umberto"
).split()
TRAIN_CITIES = (
    "Oslo Berlin Madrid Paris Rome Vienna Prague Warsaw Dublin London Lisbon Athens Helsinki "
    "Stockholm Budapest Brussels Geneva Zurich Munich Hamburg Milan Naples Turin Seville "
    "Valencia Porto Lyon Marseille Glasgow Leeds Bristol Cardiff Belfast Boston Chicago "
    "Denver Seattle Dallas Houston Miami Toronto Montreal Ottawa Sydney Perth Tokyo Osaka "
    "Seoul Delhi Mumbai Cairo Lagos Nairobi Lima Quito Bogota Havana Krakow Bergen Malmo "
    "Tampere Riga Vilnius Tbilisi Izmir Haifa Dubai Doha Ankara Aberdeen Adelaide Alicante "
    "Amsterdam Atlanta Auckland Baltimore Bangkok Barcelona Basel Bilbao Birmingham Bologna "
    "Bremen Brisbane Bucharest Cambridge Canberra Chennai Cleveland Cologne Copenhagen Cork "
    "Detroit Dortmund Dundee Durban Eindhoven Frankfurt Galway Genoa Ghent Granada Graz "
    "Groningen Halifax Hanover Honolulu Istanbul Karachi Kolkata Lausanne Leipzig Lille "
    "Limerick Linz Ljubljana Lucerne Luxembourg Malaga Manchester Manila Marrakesh Memphis "
    "Minsk Montevideo Nagoya Nantes Newcastle Norwich Nottingham Nuremberg Palermo "
    "Philadelphia Pittsburgh Plymouth Poznan Richmond Rochester Sacramento Santiago Sapporo "
    "Sheffield Singapore Stuttgart Tampa Tehran Toulouse Trieste Trondheim Tunis Uppsala "
    "Verona Vicenza Winnipeg Wroclaw York Bordeaux Innsbruck Salzburg Zagreb Avignon Bamberg "
    "Bergamo Brno Burgos Cadiz Coimbra Debrecen Delft Dijon Essen Exeter Faro Gdansk Grenoble "
    "Haarlem Heidelberg Inverness Kassel Katowice Klagenfurt Kosice Leiden Leuven Lodz Lublin "
    "Lugano Mainz Mannheim Murcia Namur Odense Oviedo Padua Perugia Potsdam Ravenna Reims "
    "Rostock Rouen Siena Stavanger Tartu Toledo Turku Udine Viborg Wexford Zadar Zamora "
    "Ostrava Tallinn Jakarta Evora Szeged Osnabruck Goslar Lubeck"
).split()
HELD_OUT_CITIES = (
    "Antwerp Gothenburg Rotterdam Utrecht Aarhus Bruges Chemnitz Cremona Erfurt Fribourg "
    "Girona Hereford Jena Kilkenny Maastricht Modena Olomouc Parma Pilsen Regensburg Rennes "
    "Salamanca Sligo Tromso Varna Wiesbaden Zwolle Braga Bielefeld Flensburg"
).split()

# Shares of rows that leave the colour or the day unsaid.
NO_COLOUR, NO_DUE = 0.3, 0.3


def make_row(
    rng: random.Random,
    patterns: tuple[str, ...],
    dues: tuple[str, ...],
    names: list[str],
    cities: list[str],
) -> dict[str, Any]:
    """One chat row: system, order, record."""
    item = rng.choice(list(ITEMS))
    quantity = rng.randint(1, len(NUMBERS))
    colour = None if rng.random() < NO_COLOUR else rng.choice(COLOURS)
    due = None if rng.random() < NO_DUE else rng.choice(DAYS)
    number = NUMBERS[quantity - 1] if rng.random() < 0.7 else str(quantity)
    words = (number, colour, item if quantity == 1 else ITEMS[item])
    what = " ".join(word for word in words if word)
    name, city = rng.choice(names), rng.choice(cities)
    phrase = rng.choice(dues).format(due) if due else ""
    order = rng.choice(patterns).format(what=what, name=name, city=city, due=phrase)
    record = dict(zip(KEYS, (item, colour, quantity, name, city, due), strict=True))
    answer = json.dumps(record, separators=(",", ":"), ensure_ascii=True)
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": order[0].upper() + order[1:]},
            {"role": "assistant", "content": answer},
        ]
    }


def make_split(held_out: bool) -> list[dict[str, Any]]:
    """All rows of a split, no order twice."""
    rng = random.Random(SEED + held_out)
    if held_out:
        source = (HELD_OUT_PATTERNS, HELD_OUT_DUES, HELD_OUT_NAMES, HELD_OUT_CITIES)
    else:
        source = (TRAIN_PATTERNS, TRAIN_DUES, TRAIN_NAMES, TRAIN_CITIES)
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < (NUM_HELD_OUT if held_out else NUM_TRAIN):
        row = make_row(rng, *source)
        rows[row["messages"][1]["content"]] = row
    return list(rows.values())


def as_jsonl(rows: list[dict[str, Any]]) -> str:
    """One row per line."""
    return "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows)


def files() -> dict[str, str]:
    """File name -> text."""
    return {
        "train.jsonl": as_jsonl(make_split(held_out=False)),
        "heldout.jsonl": as_jsonl(make_split(held_out=True)),
    }


def main(folder: Path = FOLDER) -> None:
    """Write both files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (folder / name).write_text(text, encoding="utf-8")
        print(f"{folder / name}: {text.count(chr(10))} rows")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
