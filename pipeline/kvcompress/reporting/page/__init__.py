"""The report page: one HTML file with everything in it, which asks no server for anything.

`markup` escapes, `scale` turns numbers into places and colours, `heads` gathers what is known of every head, `head_map`,
`chart`, `facts` and `speed` draw, `sections` says what stands where, `document` puts style and script around it.
"""
