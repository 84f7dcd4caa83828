"""What the invariants are called, in words; how each is checked is said in docs/testing.md."""

LAWS = {
    "I1": "Every page is in exactly one state",
    "I2": "Nothing leaks",
    "I3": "Reference counts are holders",
    "I4": "Nobody reads a page that is freed or not fully written",
    "I5": "A page that may still be written is held, and by nobody else",
    "I6": "No host buffer changes under a dispatch",
    "I7": "A cached page is what its name says",
    "I8": "A host tier loads back what was stored",
    "I9": "Pages used for attention are as produced",
    "I10": "A transfer is valid only if epoch, lease and generation stand",
    "I11": "Sources sum to the prompt, each token once",
    "I12": "Everything accepted ends, once",
    "I13": "No exception is swallowed",
    "I14": "An answer is that of the request alone",
    "I15": "Ids are ours and unique",
    "I16": "Late events are ignored",
    "I17": "One request's fault is nobody else's",
    "I18": "Peers are known by name and life",
    "I19": "Gauges are what is, counters only grow",
    "I20": "Health tells the truth",
    "I21": "Bounds hold",
    "I22": "Nobody starves",
    "I23": "Tenants are apart",
    "I24": "Streams are whole",
    "I25": "An engine that is asked to end serves what it took in",
    "I26": "The same seed, the same trace",
    "R1": "A client gets an error of the router's own only where nobody could have answered",
    "R2": "Who has failed is not asked",
    "R3": "Nobody waits for the silent",
    "R4": "A client gets what was said to it",
    "R5": "Calls are few, ends are one",
}


def law_name(law: str) -> str:
    """The name of a law, or of the first of several ("I1-I3")."""
    return LAWS[law.split("-")[0]]
