"""The gradient of the upper objective with respect to the scores, from one number per document.

Both estimators reduce to a number d_i per document, the rate at which more weight on document i lowers the upper loss
at the solution of the lower level:

* implicit: ``d_i = < grad l_i(theta_p), z >`` with ``(H + damping I) z = grad f`` (BLISS, section 3)
* penalty:  ``d_i = lambda (l_i(m) - l_i(w))``, the excess loss of a baseline m over the reference w (BLADE, section 3)

Sign: ``dPhi / dP_i = -d_i``, so a document with large d_i deserves weight.
"""

import torch
from torch import Tensor

from bilect.functional.weights import Weighting, document_weights, standardise

__all__ = ["penalty_values", "score_gradient"]


def penalty_values(baseline_loss_B: Tensor, reference_loss_B: Tensor, penalty: float = 1.0) -> Tensor:
    """``d_i = lambda (l_i(m) - l_i(w))``: positive where the reference, pulled to the target, is the better model.

    Args:
        baseline_loss_B: losses under m: the model itself (BLADE) or the matched twin.
        reference_loss_B: losses under w.
        penalty: lambda.
    """
    return penalty * (baseline_loss_B - reference_loss_B)


def score_gradient(
    score_M: Tensor, d_M: Tensor, weighting: Weighting = "softmax", standardised: bool = True
) -> tuple[Tensor, Tensor]:
    """``dPhi / ds_i`` for the documents of the global batch.

    For softmax weights ``dPhi/ds_i = -P_i (d_i - dbar)``, ``dbar = sum_j P_j d_j``: raising the scores of documents
    with d above the weighted mean lowers Phi. Obtained as the gradient of ``-sum_i P_i(s) d_i`` with d constant.

    Args:
        score_M: scores of all documents of the global batch.
        d_M: values as in the module.
        weighting: how scores become weights.
        standardised: bring d to mean 0 and deviation 1 over the batch first. The mean does not matter under softmax
            weights; the deviation fixes the scale, which otherwise drifts by orders of magnitude over a fit.

    Returns:
        The gradient (M,) and the weights P (M,).
    """
    if standardised:
        d_M = standardise(d_M)
    with torch.enable_grad():
        leaf_M = score_M.detach().requires_grad_()
        weight_M = document_weights(leaf_M, weighting)
        (gradient_M,) = torch.autograd.grad(-(weight_M * d_M.detach()).sum(), leaf_M)
    return gradient_M, weight_M.detach()
