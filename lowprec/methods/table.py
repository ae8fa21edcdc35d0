"""The table of methods. To add one: a file with its functions, one line here, one case in tests/test_methods.py."""

from __future__ import annotations

from lowprec.methods.agc import attach_agc
from lowprec.methods.bn_free_binary import attach_bn_free_binary, convert_bn_free_binary
from lowprec.methods.bnp import attach_bnp, convert_bnp
from lowprec.methods.bounded import attach_bounded_weight_norm, convert_bounded_weight_norm
from lowprec.methods.frn import convert_frn
from lowprec.methods.ic import convert_ic
from lowprec.methods.kalman import convert_kalman
from lowprec.methods.mean_only import convert_mean_only
from lowprec.methods.method import Method
from lowprec.methods.mimic_norm import attach_mimic_norm, convert_mimic_norm
from lowprec.methods.norm_schedule import attach_norm_schedule
from lowprec.methods.one_batch_norm import convert_one_batch_norm
from lowprec.methods.replace_norm import convert_l1, convert_l2_half, convert_linf, convert_topk
from lowprec.methods.scaled_ws import convert_scaled_ws
from lowprec.methods.wd_mimic import attach_wd_mimic
from lowprec.methods.weight_norm_lp import attach_weight_norm_lp, convert_weight_norm_lp

_NORM_MATTERS = "Hoffer, Banner, Golan, Soudry, Norm matters, NeurIPS 2018"

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("l1", "module", "batch norms become L1 batch norms", _NORM_MATTERS, convert_l1, folds="exactly"),
        Method(
            "linf", "module", "batch norms become L-infinity batch norms", _NORM_MATTERS, convert_linf, folds="exactly"
        ),
        Method(
            "topk",
            "module",
            "batch norms become batch norms over the k largest deviations",
            _NORM_MATTERS,
            convert_topk,
            folds="exactly",
        ),
        Method(
            "l2_half",
            "module",
            "batch norms keep their formula, with statistics in true half arithmetic",
            _NORM_MATTERS,
            convert_l2_half,
            folds="exactly",
        ),
        Method(
            "bounded_weight_norm",
            "module",
            "every row of the weights has one fixed norm per layer",
            _NORM_MATTERS,
            convert_bounded_weight_norm,
            attach_bounded_weight_norm,
            folds="into plain weights",
        ),
        Method(
            "weight_norm_lp",
            "module",
            "every row of the weights has one fixed 1-norm, maximum or top-k norm per layer",
            _NORM_MATTERS,
            convert_weight_norm_lp,
            attach_weight_norm_lp,
            folds="into plain weights",
        ),
        Method(
            "mean_only",
            "module",
            "batch norms take off the mean and divide by nothing; for weights of fixed norm",
            _NORM_MATTERS,
            convert_mean_only,
            folds="exactly, into biases",
        ),
        Method(
            "mimic_norm",
            "module",
            "no batch norm but one on the logits; conv weights are centred after every step",
            "Fei, Dai, Li, Zou, Xiong, MimicNorm, arXiv 2010.09278",
            convert_mimic_norm,
            attach_mimic_norm,
            folds="exactly",
        ),
        Method(
            "one_batch_norm",
            "module",
            "fixed scales in place of all norms, one batch norm before the head, and a head that bypasses it",
            "KataGo, One Batch Norm and fixed variance initialisation, docs/KataGoMethods.md",
            convert_one_batch_norm,
            folds="exactly",
        ),
        Method(
            "bnp",
            "module",
            "no batch norm; gradients are preconditioned as if there were one before every layer",
            "Lange, Helfrich, Ye, Batch Normalization Preconditioning, JMLR 2022",
            convert_bnp,
            attach_bnp,
        ),
        Method(
            "kalman",
            "module",
            "batch norms mix their moments with what the layers before them predict, for batches of a few samples",
            "Wang, Peng, Luo, Wang, Lin, Batch Kalman Normalization, arXiv 1802.03133",
            convert_kalman,
            folds="exactly",
        ),
        Method(
            "scaled_ws",
            "module",
            "no batch norm; weights are standardised and hold the constants of a normaliser-free network",
            "Brock, De, Smith, Simonyan, arXiv 2101.08692 and 2102.06171",
            convert_scaled_ws,
            folds="into plain weights",
        ),
        Method(
            "bn_free_binary",
            "module",
            "no batch norm; inner convolutions have binary weights and inputs, gradients are clipped adaptively",
            'Chen, Zhang, Ouyang, Liu, Shen, Wang, "BNN - BN = ?", arXiv 2104.08215',
            convert_bn_free_binary,
            attach_bn_free_binary,
            folds="into weights of two values per channel",
        ),
        Method(
            "agc",
            "step",
            "gradients are clipped per output channel, in proportion to its weights",
            "Brock, De, Smith, Simonyan, High-performance large-scale image recognition, arXiv 2102.06171",
            attach=attach_agc,
        ),
        Method(
            "ic",
            "module",
            "batch norm and dropout before every weight layer, in place of batch norm after it",
            "Chen et al., Rethinking the Usage of Batch Normalization and Dropout, arXiv 1905.05928",
            convert_ic,
            folds="exactly; between a ReLU and zero padding one operation per channel stays",
        ),
        Method(
            "frn",
            "module",
            "batch norms divide each map by its own root mean square, and learned thresholds stand for the ReLUs",
            "Singh, Krishnan, Filter Response Normalization Layer, CVPR 2020",
            convert_frn,
            folds="no: its statistics are those of each sample",
        ),
        Method(
            "wd_mimic",
            "step",
            "no weight decay: every step is corrected to the weight norms recorded in a run that had it",
            _NORM_MATTERS,
            attach=attach_wd_mimic,
        ),
        Method(
            "norm_schedule",
            "step",
            "weight norms grow on a schedule instead of a learning rate that falls",
            _NORM_MATTERS,
            attach=attach_norm_schedule,
        ),
        Method(
            "batch_augmentation",
            "data",
            "every batch holds several copies of its samples, each augmented by itself",
            "Hoffer, Ben-Nun, Hubara, Giladi, Hoefler, Soudry, Augment Your Batch, CVPR 2020",
            instead="set [data] copies and augment, or use lowprec.train.BatchAugmentation in a loop of your own",
        ),
    )
}
