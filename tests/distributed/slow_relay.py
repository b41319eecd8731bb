"""ssh's ProxyCommand with a slow line: python slow_relay.py HOST PORT SECONDS KBIT_PER_S.

Each direction hands on what it reads so many seconds later, and no faster than the rate.
"""

from __future__ import annotations

import os
import queue
import socket
import sys
import threading
import time


def carry(read: int, write: int, delay: float, rate: float) -> None:
    """Carry one direction to its end."""
    waiting: queue.Queue[tuple[float, bytes]] = queue.Queue()

    def hand_on() -> None:
        while True:
            due, data = waiting.get()
            time.sleep(max(0.0, due - time.monotonic()))
            while data:
                data = data[os.write(write, data) :]

    threading.Thread(target=hand_on, daemon=True).start()
    while data := os.read(read, 4096):
        time.sleep(len(data) / rate)
        waiting.put((time.monotonic() + delay, data))
    time.sleep(2 * delay)


def main() -> None:
    """Connect, and carry both directions until one ends."""
    host, port, delay, kbit = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
    connection = socket.create_connection((host, port))
    there = connection.fileno()
    rate = kbit * 1000 / 8
    both = [threading.Thread(target=carry, args=(a, b, delay, rate), daemon=True) for a, b in ((0, there), (there, 1))]
    for direction in both:
        direction.start()
    both[1].join()


if __name__ == "__main__":
    main()
