"""Train a model of MNIST given the class, and classify the digits with it.

One network gives p(x | c) and p(x), and Bayes' rule gives the class c.

Command: python main.py --config=configs/mnist/class_conditional.py --workdir=runs/mnist_class
         --mode=train,eval --config.data.path=mnist.npz --config.training.n_iters=13000
55 minutes of training on one CPU core, and 10 minutes of classification.
Expected: bound 0.9835 ± 0.0208 bits/dim given the class, 0.9964 ± 0.0207 without it,
accuracy by the bound 94.5 ± 1.6 %, 200 test images (docs/results.md).
Every tenth example is seen without its class. Network and training are those of mnist/sharp.py.
"""

from ml_collections import ConfigDict

from configs.mnist import sharp


def get_config() -> ConfigDict:
    """The classes 0 to 9 as context, dropped for a tenth of the examples, and evaluated."""
    config = sharp.get_config()
    config.data.update(context="class")
    config.training.update(context_dropout=0.1)
    config.eval.update(classify=True, num_times=64, num_examples=200)
    return config
