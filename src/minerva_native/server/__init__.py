"""An HTTP server with OpenAI's API, over the public API of this package: `minerva serve`.

`bodies` says what clients may send and `replies` and `responses` what they get; `app` has the endpoints, `guard` stands
before them, `models` loads what they need, `connection` and `run` hold the sockets. Needs the extra `server`.
"""
