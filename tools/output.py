"""Output of untrusted code as text of bounded size, cut in the middle while it is read.

Imports nothing, because it is also loaded and sent by itself, as a part of programs that run apart from rlsys.
"""


class Output:
    """What the interpreter wrote, cut in the middle while it is read: a head and a tail of bounded size."""

    def __init__(self, max_characters: int) -> None:
        self.max_characters = max_characters
        self.max_bytes = 4 * max_characters  # a character has at most 4 bytes in UTF-8
        self.head, self.tail, self.dropped = bytearray(), bytearray(), 0

    def add(self, data: bytes) -> None:
        """Keep the first and the last `max_bytes` and count the characters between them."""
        space = self.max_bytes - len(self.head)
        self.head += data[:space]
        self.tail += data[space:]
        if len(self.tail) > 2 * self.max_bytes + (1 << 16):
            self.dropped += len(self.tail[: -self.max_bytes].translate(None, bytes(range(0x80, 0xC0))))
            del self.tail[: -self.max_bytes]

    def text(self) -> str:
        """At most `max_characters` of it, with a note that says how many are missing."""
        if not self.dropped:
            head, tail = (self.head + self.tail).decode("utf-8", "replace"), ""
        else:
            head, tail = self.head.decode("utf-8", "replace"), self.tail.decode("utf-8", "replace")
        total = len(head) + self.dropped + len(tail)
        if total <= self.max_characters:
            return head
        first = self.max_characters // 2
        last = self.max_characters - first
        cut = total - self.max_characters
        return f"{head[:first]}\n[... {cut} characters cut ...]\n{(tail or head)[-last:]}"
