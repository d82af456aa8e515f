"""Readable names for the labels of the sources."""

_ORGANS = {
    "liver": "liver",
    "spleen": "spleen",
    "stomach": "stomach",
    "colon": "colon",
    "small_bowel": "small bowel",
    "urinary_bladder": "urinary bladder",
    "gallbladder": "gallbladder",
    "pancreas": "pancreas",
    "duodenum": "duodenum",
    "aorta": "aorta",
    "inferior_vena_cava": "inferior vena cava",
    "sacrum": "sacrum",
    "prostate": "prostate",
    "vertebrae": "vertebra",
}
_PAIRED = {
    "kidney": "kidney",
    "autochthon": "back muscle",
    "gluteus_maximus": "gluteus maximus",
    "gluteus_medius": "gluteus medius",
    "hip": "hip bone",
    "iliopsoas": "iliopsoas muscle",
    "femur": "femur",
}


def organ(label: str) -> str | None:
    """Name of a TotalSegmentator label; None for those that the set leaves out."""
    if label in _ORGANS:
        return _ORGANS[label]
    if label.startswith("vertebrae_"):
        return "vertebra"
    if label.startswith("lung_") and label.endswith(("_left", "_right")):
        return f"{label.rsplit('_', 1)[1]} lung"
    stem, _, side = label.rpartition("_")
    return f"{side} {_PAIRED[stem]}" if stem in _PAIRED and side in ("left", "right") else None


_REGIONS = (
    (("Frontal", "Precentral", "Rolandic", "Supp_Motor", "Rectus", "Olfactory"), "frontal lobe"),
    (("Temporal", "Heschl", "Fusiform", "ParaHippocampal"), "temporal lobe"),
    (("Parietal", "Postcentral", "SupraMarginal", "Angular", "Precuneus"), "parietal lobe"),
    (("Paracentral",), "parietal lobe"),
    (("Occipital", "Calcarine", "Cuneus", "Lingual"), "occipital lobe"),
    (("Cerebelum",), "cerebellar hemisphere"),
    (("Cingulum",), "cingulate cortex"),
    (("Insula",), "insula"),
    (("Hippocampus",), "hippocampus"),
    (("Caudate",), "caudate nucleus"),
    (("Putamen",), "putamen"),
    (("Thalamus",), "thalamus"),
)


def brain_region(label: str) -> str | None:
    """Name of an AAL label, lobes joined; None for those that the set leaves out."""
    if label.startswith("Vermis"):
        return "cerebellar vermis"
    side = {"L": "left", "R": "right"}.get(label.rsplit("_", 1)[-1])
    for prefixes, name in _REGIONS:
        if label.startswith(prefixes) and side:
            return f"{side} {name}"
    return None
