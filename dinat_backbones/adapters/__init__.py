"""One module or package per framework, the only place that imports it; panoptic.py and seeding.py need none."""
