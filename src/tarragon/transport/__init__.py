"""The only place that opens sockets or shared memory (section 4.1).

================  ==========================================================================
``local``         blocking, authenticated, framed connections between processes of one host
``aio``           the same wire format for asyncio
``region``        (token, expert) rows in sealed shared memory
``link``          a data link: one region and the doorbells that announce its rows
``handshake``     how both ends prove that they know the cluster's secret, without I/O
``frames``        header and assembly of a frame, without I/O
``sockets``       abstract Unix sockets and the credentials of who is at the other end
================  ==========================================================================
"""
