"""The attacks that a sandbox for the policy's code must deny and survive, with the arena that tries them.

Each attack is code that a session runs, written for an attacker who knows the host (paths, ports, process ids) and
calls the kernel directly. None of them does harm where it succeeds: signals are ones that nobody minds, bombs stop at
a few times their limit, and switches are asked with wrong words.
"""

from tests.tools.attacks.arena import Arena, Verdict
from tests.tools.attacks.attack import TIERS, Attack
from tests.tools.attacks.confidential import SECRETS
from tests.tools.attacks.files import FILES
from tests.tools.attacks.kernel import KERNEL
from tests.tools.attacks.network import NETWORK
from tests.tools.attacks.patience import OUTPUT, TIME
from tests.tools.attacks.processes import PROCESSES
from tests.tools.attacks.protocol import PROTOCOL
from tests.tools.attacks.resources import DISK, MEMORY
from tests.tools.attacks.state import STATE
from tests.tools.attacks.world import World

ATTACKS: tuple[Attack, ...] = (
    *NETWORK, *SECRETS, *FILES, *PROCESSES, *KERNEL, *MEMORY, *DISK, *OUTPUT, *TIME, *PROTOCOL, *STATE,
)  # fmt: skip

__all__ = ["ATTACKS", "Arena", "Attack", "TIERS", "Verdict", "World"]
