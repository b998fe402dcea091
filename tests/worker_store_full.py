"""Train in a store whose file system is too small for all tenants; tests/test_serving_store_faults.py starts it.

``worker_store_full.py MOUNT`` runs in a mount namespace of its own, where it may mount a tmpfs. It prints how many
steps the disk was too full for and how many were done, or an AssertionError says what was lost.
"""

import contextlib
import random
import subprocess
import sys
from pathlib import Path

from stores import Twin, gradients, make_store, print_of

from cylora import StoreError

PAGE = 4096
TENANTS = [f"user{i}" for i in range(8)]


def main(mount: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={PAGE * 30},nr_inodes=40", "none", mount], check=True)
    refused = done = 0
    rng = random.Random(0)
    try:
        store = make_store(mount / "s", room=3)
        twins = {}
        for tenant in TENANTS:
            store.create(tenant)
            twins[tenant] = Twin(tenant)
        for step in range(300):
            if step % 40 == 0:
                (mount / "ballast").write_bytes(b"")
            if step % 40 == 20:
                with contextlib.suppress(OSError):  # the whole disk is taken
                    (mount / "ballast").write_bytes(bytes(PAGE * 30))
            tenant = rng.choice(TENANTS)
            try:
                record = store.step(tenant, *gradients(tenant, step))
            except StoreError:
                refused += 1
                continue
            assert record == twins[tenant].step(*gradients(tenant, step)), (tenant, step)
            done += 1
        (mount / "ballast").write_bytes(b"")
        for tenant, twin in twins.items():
            assert print_of(store, tenant) == twin.print(), tenant
        store.close()
        with make_store(mount / "s") as store:
            for tenant, twin in twins.items():
                assert print_of(store, tenant) == twin.print(), tenant
    finally:
        subprocess.run(["umount", mount], check=True)
    print(refused, done)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
