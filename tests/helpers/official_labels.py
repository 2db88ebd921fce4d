"""Label values as the organisers of challenges give them, written out a second time for tests."""

# As its dataset.json has them, spelling included (Ji et al., AMOS, 2022; amos22.grand-challenge.org).
AMOS_LABELS = {
    "0": "background", "1": "spleen", "2": "right kidney", "3": "left kidney", "4": "gall bladder", "5": "esophagus",
    "6": "liver", "7": "stomach", "8": "arota", "9": "postcava", "10": "pancreas", "11": "right adrenal gland",
    "12": "left adrenal gland", "13": "duodenum", "14": "bladder", "15": "prostate/uterus",
}  # fmt: skip
# In the order of the organisers' list (Multi-Atlas Labeling Beyond the Cranial Vault, Synapse syn3193805, abdomen).
BTCV_LABELS = {
    1: "spleen", 2: "right kidney", 3: "left kidney", 4: "gallbladder", 5: "esophagus", 6: "liver", 7: "stomach",
    8: "aorta", 9: "inferior vena cava", 10: "portal vein and splenic vein", 11: "pancreas",
    12: "right adrenal gland", 13: "left adrenal gland",
}  # fmt: skip
# Necrotic core, edema, enhancing tumour (Baid et al., 2021, arXiv:2107.02314; of 2023: synapse.org syn51156910).
BRATS_LABELS = {"2021": {1: "NCR", 2: "ED", 4: "ET"}, "2023": {1: "NCR", 2: "SNFH", 3: "ET"}}
