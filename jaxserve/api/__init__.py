"""OpenAI's JSON as values, and values as OpenAI's JSON. Pure: no I/O, no clock, no server.

`body` reads bytes strictly, `fields` reads one object field by field, `generation` holds what both routes
share, `completions`, `chat` and `tokens` read the routes' own fields, `known` lists them, `prompts` fits
token ids to the model, `plain` keeps control tokens out of messages, `replies`, `choices` and `logprobs`
write the answers. Every problem is an `ApiError` that names the field.
"""
