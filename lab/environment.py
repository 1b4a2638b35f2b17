"""Say in one line what this machine lacks: `python environment.py` the version of Python, `python
environment.py FILE` the packages of a requirements file too. Standard library only."""
import sys
from importlib.metadata import PackageNotFoundError, version


def lacks(requirements=None):
    """What is missing and how to mend it, or None."""
    if sys.version_info < (3, 11):
        return f"Python 3.11 or newer is needed, this one is {sys.version.split()[0]}"
    missing = []
    for line in open(requirements) if requirements else []:
        name = line.split("==")[0].strip()
        try:
            name.startswith("#") or "# optional" in line or not name or version(name)
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        return f"missing in the active environment: {' '.join(missing)}; run: " \
               f"pip install -r {requirements}"


if __name__ == "__main__":
    if problem := lacks(*sys.argv[1:2]):
        sys.exit(print(f"error: {problem}", file=sys.stderr) or 2)
