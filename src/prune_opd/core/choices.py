"""The named choices of the method, importable without torch so that recipes can be checked anywhere."""

from typing import Literal

DriftMetric = Literal["overlap_ratio", "teacher_top_p_accept", "overlap_mass"]
TopKStrategy = Literal["only_stu", "only_tch", "intersection", "union"]
RewardWeightMode = Literal["student_p", "teacher_p", "none"]
Normalization = Literal["token_mean", "weight_mean"]
AfterDrift = Literal["both", "task_only"]
VocabularyLoss = Literal["forward_kl", "reverse_kl", "jsd"]
LossName = Literal["topk_reverse_kl", "sampled_token", VocabularyLoss]
EndTokens = Literal["auto", "equivalent", "distinct"]
Attention = Literal[
    "auto", "sdpa", "eager", "flex_attention", "varlen", "flash_attention_2", "flash_attention_3", "flash_attention_4"
]
