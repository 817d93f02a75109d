"""The cluster's one authority on who is a member and where experts are (3.2, 5.4).

Pure, with events and the time coming in and actions going out:

==============  ==========================================================================
``membership``  workers, their incarnations and states
``relations``   who needs whom: what workers are told of others, whose suspicions count
``residency``   which experts each expert worker shall hold now, on the way to the placement
``planning``    the placement to pursue, from settings, model and ``usage``
``restarts``    when a dead worker is started again
``adoption``    which workers a restarted orchestrator takes over
``recovery``    what to do about a death, a return, a message
``commands``    what people ask for: kill, drain, add, restart, remove
``actions``     what recovery wants done
``snapshot``    what the cluster looks like, for people
==============  ==========================================================================

At the edge: ``process`` (the process itself), ``line`` (one connection), ``status`` (the HTTP interface)
and ``events`` (what happened lately).
"""
