"""The core: interfaces, registry, recipes, and the pipeline in which the five parts meet. Imports no torch."""
