"""What `import keras_vit` adds to `import keras`, in seconds: `python -m benchmarks.importing`. Medians of fresh processes."""

import statistics
import subprocess
import sys

ROUNDS = 5
CHILD = """
import time
start = time.perf_counter()
import keras
between = time.perf_counter()
import keras_vit
print(between - start, time.perf_counter() - between)
"""


def main():
    rounds = []
    for _ in range(ROUNDS):
        done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
        rounds.append([float(part) for part in done.stdout.split()])
    keras, ours = (statistics.median(column) for column in zip(*rounds))
    print(f"import keras {keras:.2f} s; import keras_vit adds {ours:.3f} s ({ours / keras:.1%})")


if __name__ == "__main__":
    main()
