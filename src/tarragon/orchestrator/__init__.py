"""The cluster's one authority on who is a member and where experts are (3.2, 5.4).

==============  ==========================================================================
``membership``  workers, their incarnations and states
``residency``   which experts each expert worker shall hold now, on the way to the placement
``recovery``    what to do about a death, a return, a drain: events in, actions out
``process``     the process: sockets, timers, and nothing to decide
``status``      the HTTP interface for operators
==============  ==========================================================================
"""
