"""`params.yaml`: every dial of the pipeline, checked strictly. One file a theme, so that a stage depends on its own alone.

Unknown names, wrong types (also numbers written as strings), NaN and contradictions are `InputError`s that name the
field.
"""
