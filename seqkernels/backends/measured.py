"""Constants of what a step costs, by GPU and kernel: microseconds, to multiply the backends' terms by.

Written by `python -m benchmarks fit` from the rows in benchmarks/results; not to be changed by hand.
"""

MEASURED: dict[str, dict[str, tuple[float, ...]]] = {
    "NVIDIA H200": {
        "cuda call infer": (228.7,),
        "cuda call infer bfloat16": (224.1,),
        "cuda call train": (1122.2,),
        "cuda call train bfloat16": (1150.6,),
        "cuda cluster backward": (0.9205, 0.2824, 0.1347, 4.5408, 0.0247, 0.056, 1.1707, 0.5476, 0.0),
        "cuda cluster forward": (0.9282, 0.3158, 0.1025, 0.0, 0.0504, 0.1058, 1.1822, 0.2273, 0.0),
        "cuda persistent grid backward": (2.0974, 0.7258, 0.2607, 0.0, 4.2865, 0.0715, 1.1395, 0.0),
        "cuda persistent grid forward": (1.8345, 0.1261, 0.2107, 2.2891, 1.2818, 0.0, 0.0),
        "cuda single CTA backward": (0.2338, 0.5631, 0.0, 1.4804, 0.8935, 0.752),
        "cuda single CTA forward": (0.4738, 0.4547, 0.0, 0.8169, 1.046, 0.8923),
        "cuda stepwise backward": (17.0123,),
        "cuda stepwise forward": (15.668,),
        "cudnn PERSIST_STATIC forward": (2.0582,),
        "cudnn PERSIST_STATIC_SMALL_H backward": (0.7373, 0.6417, 0.0746),
        "cudnn PERSIST_STATIC_SMALL_H forward": (0.6509, 0.6517, 0.0292),
        "cudnn STANDARD backward": (13.7631,),
        "cudnn STANDARD forward": (12.442,),
        "cudnn call infer": (154.9,),
        "cudnn call infer bfloat16": (601.6,),
        "cudnn call train": (1054.2,),
        "cudnn call train bfloat16": (1892.0,),
    },
}
