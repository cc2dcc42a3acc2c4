"""Every method of debias, one line each.

A line here makes what the file names in ``__all__`` public: its classes in ``debias``, its functions in
``debias.functional`` and its mixin in ``debias.mixins``. ``debias methods``, the API page and the conformance suite
read this list, too.
"""

# ruff: noqa: I001

# reweighing
from debias.methods.group_dro import *
from debias.methods.domain_penalisation import *
from debias.methods.group_reweighting import *

# reweighing without group labels
from debias.methods.infer_groups import *
from debias.methods.just_train_twice import *
from debias.methods.learning_from_failure import *
from debias.methods.cvar_dro import *
from debias.methods.chi_square_dro import *

# class imbalance
from debias.methods.logit_adjustment import *
from debias.methods.class_balanced import *
from debias.methods.ldam import *
from debias.methods.focal_loss import *

# last layer
from debias.methods.last_layer_retraining import *

# penalties
from debias.methods.hessian_alignment import *
from debias.methods.fishr import *
from debias.methods.irm import *
from debias.methods.vrex import *
from debias.methods.coral import *
from debias.methods.mmd import *

# adversaries
from debias.methods.identity_adversarial import *
from debias.methods.domain_adversarial import *

# augmentation
from debias.methods.mixstyle import *
from debias.methods.dsu import *
from debias.methods.adv_style import *
from debias.methods.group_mixup import *
from debias.methods.edge_view import *
from debias.methods.crafted_shifts import *
