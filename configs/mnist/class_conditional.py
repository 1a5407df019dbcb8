"""Train a model of MNIST given the class, and classify the digits with it.

One network gives p(x | c) and p(x), and Bayes' rule gives the class c.

Command: python main.py --config=configs/mnist/class_conditional.py --workdir=runs/mnist_class
         --mode=train,eval --config.data.path=mnist.npz
Expected: not reproduced here.
Every tenth example is seen without its class. Network and training are those of mnist/sharp.py.
"""

from ml_collections import ConfigDict

from configs.mnist import sharp


def get_config() -> ConfigDict:
    """The classes 0 to 9 as context, dropped for a tenth of the examples, and evaluated."""
    config = sharp.get_config()
    config.data.update(context="class")
    config.training.update(context_dropout=0.1)
    config.eval.update(classify=True, num_times=8, num_examples=1000)
    return config
