"""One file for each family. Importing this package registers them all."""

import importlib
import pkgutil

FAMILIES = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
