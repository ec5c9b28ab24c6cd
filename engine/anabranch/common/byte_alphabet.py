"""How byte-level vocabularies spell bytes: a printable character each."""


def byte_alphabet() -> list[str]:
    """Character of each byte in GPT-2's alphabet: itself when printable Latin-1, else the next free one from 256."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    characters, free = [], 256
    for byte in range(256):
        characters.append(chr(byte if byte in printable else free))
        free += byte not in printable
    return characters
