"""Where experts are: ``placement`` decides who shall hold them, ``table`` says who does (the ERT, 4.2).

``static`` is what a table replaces, kept as a baseline.
"""
