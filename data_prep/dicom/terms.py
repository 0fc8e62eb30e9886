"""Closed lists: what a code string, a region code or a manufacturer may say. What is not here cannot leave.

Sources: PS3.3 C.7.3.1.1.1 (modality), PS3.16 Annex L (body part) and CID 4 (regions), PS3.3 C.7.6.3.1.2 (photometric
interpretation), C.8.11 (view position).
"""

from __future__ import annotations

from typing import NamedTuple


def _words(text: str) -> list[str]:
    return text.split()


MODALITIES = frozenset(
    _words(
        "AR ASMT AU BDUS BI BMD CFM CR CT CTPROTOCOL DMS DG DOC DX ECG EEG EMG EOG EPS ES FID GM HC HD IO "
        "IOL IVOCT IVUS KER KO LEN LS MG MR M3D NM OAM OCT OP OPM OPT OPTBSV OPTENF OPV OSS OT PA PLAN "
        "POS PR PT PX REG RESP RF RG RTDOSE RTIMAGE RTINTENT RTPLAN RTRAD RTRECORD RTSEGANN RTSTRUCT RWV "
        "SEG SM SMR SR SRF STAIN TEXTUREMAP TG US VA XA XAPROTOCOL XC"
    )
)

# Body part -> our anatomy; None is a part that the vocabulary has no word for, or that spans several.
BODY_PARTS: dict[str, str | None] = {
    **dict.fromkeys(
        _words(
            "ABDOMEN ABDOMENPELVIS ADRENAL BLADDER COLON DUODENUM GALLBLADDER ILEUM JEJUNUM KIDNEY LIVER "
            "OVARY PANCREAS PELVIS PROSTATE RECTUM SPLEEN STOMACH UPRURINARYTRACT URETER UTERUS"
        ),
        "abd",
    ),
    **dict.fromkeys(("CHEST", "LUNG"), "lung"),
    **dict.fromkeys(("ANKLE", "CALCANEUS", "FOOT", "TOE"), "af"),
    **dict.fromkeys(("BRAIN", "CEREBELLUM", "HEAD", "SKULL"), "brain"),
    "HIP": "hip",
    **dict.fromkeys(("KNEE", "PATELLA"), "knee"),
    "SHOULDER": "shoulder",
    **dict.fromkeys(_words("COCCYX CSPINE CTSPINE LSPINE LSSPINE SPINE SSPINE TLSPINE TSPINE"), "spine"),
    "THYROID": "thyroid",
    **dict.fromkeys(("CORNEA", "EYE", "RETINA", "SCLERA"), "eye"),
    "BREAST": "breast",
    **dict.fromkeys(("FINGER", "HAND", "THUMB"), "hand"),
    **dict.fromkeys(
        _words(
            "AORTA ARM AXILLA BACK BRONCHUS BUTTOCK CALF CAROTID CERVIX CHEEK CHESTABDOMEN CHESTABDPELVIS "
            "CIRCLEOFWILLIS CLAVICLE CORONARYARTERY EAR ELBOW ESOPHAGUS EXTREMITY EYELID FACE FEMUR FOREARM "
            "HEADNECK HEART HUMERUS IAC ILIUM JAW LARYNX LEG MANDIBLE MAXILLA MEDIASTINUM MOUTH NECK "
            "NECKCHEST NECKCHESTABDOMEN NECKCHESTABDPELV NOSE ORBIT PAROTID PENIS PHARYNX RIB SCALP SCAPULA "
            "SCROTUM STERNUM SUBMANDIBULAR TESTIS THIGH THYMUS TMJ TONGUE TRACHEA URETHRA VAGINA VULVA "
            "WHOLEBODY WRIST ZYGOMA"
        )
    ),
}

LATERALITIES = frozenset("RLUB")
VIEW_POSITIONS = frozenset(_words("AP PA LL RL RLD LLD RLO LLO LAT CC MLO ML LM LMO FB SIO XCC XCCL XCCM"))
PHOTOMETRIC_INTERPRETATIONS = frozenset(
    (
        "MONOCHROME1",
        "MONOCHROME2",
        "PALETTE COLOR",
        "RGB",
        "YBR_FULL",
        "YBR_FULL_422",
        "YBR_PARTIAL_420",
        "YBR_ICT",
        "YBR_RCT",
    )
)
SEXES = frozenset("MFO")


class Region(NamedTuple):
    """An anatomic region: SNOMED CT and SNOMED RT codes, the code's meaning, and our anatomy for it or None."""

    sct: str
    srt: str | None
    meaning: str
    anatomy: str | None


_REGIONS = (
    Region("113345001", "T-D4000", "Abdomen", "abd"),
    Region("12921003", "T-D6000", "Pelvis", "abd"),
    Region("416949008", "R-FAB57", "Abdomen and Pelvis", "abd"),
    Region("818981001", None, "Abdomen", "abd"),
    Region("816092008", None, "Pelvis", "abd"),
    Region("818982008", None, "Abdomen and Pelvis", "abd"),
    Region("10200004", "T-62000", "Liver", "abd"),
    Region("303270005", "T-50007", "Liver and biliary structure", "abd"),
    Region("64033007", "T-71000", "Kidney", "abd"),
    Region("15776009", "T-65000", "Pancreas", "abd"),
    Region("78961009", "T-C3000", "Spleen", "abd"),
    Region("69695003", "T-57000", "Stomach", "abd"),
    Region("28231008", "T-63000", "Gallbladder", "abd"),
    Region("23451007", "T-B3000", "Adrenal gland", "abd"),
    Region("71854001", "T-59300", "Colon", "abd"),
    Region("30315005", "T-58000", "Small intestine", "abd"),
    Region("14742008", "T-59000", "Large intestine", "abd"),
    Region("38848004", "T-58200", "Duodenum", "abd"),
    Region("21306003", "T-58400", "Jejunum", "abd"),
    Region("34516001", "T-58600", "Ileum", "abd"),
    Region("89837001", "T-74000", "Bladder", "abd"),
    Region("41216001", "T-92000", "Prostate", "abd"),
    Region("35039007", "T-83000", "Uterus", "abd"),
    Region("15497006", "T-87000", "Ovary", "abd"),
    Region("34402009", "T-59600", "Rectum", "abd"),
    Region("82849001", "T-D4900", "Retroperitoneum", "abd"),
    Region("818987002", None, "Intra-abdominopelvic", "abd"),
    Region("28273000", "T-60610", "Bile duct", "abd"),
    Region("34707002", "T-60600", "Biliary tract", "abd"),
    Region("816989007", None, "Intra-pelvic", "abd"),
    Region("51185008", "T-D3000", "Chest", "lung"),
    Region("816094009", None, "Thorax", "lung"),
    Region("39607008", "T-28000", "Lung", "lung"),
    Region("86598002", "T-280A0", "Apex of Lung", "lung"),
    Region("70258002", "T-15750", "Ankle joint", "af"),
    Region("56459004", "T-D9700", "Foot", "af"),
    Region("29707007", "T-D9800", "Toe", "af"),
    Region("80144004", "T-12770", "Calcaneus", "af"),
    Region("27949001", "T-15770", "Tarsal joint", "af"),
    Region("12738006", "T-A0100", "Brain", "brain"),
    Region("69536005", "T-D1100", "Head", "brain"),
    Region("89546000", "T-11100", "Skull", "brain"),
    Region("1101003", "T-D1400", "Intracranial", "brain"),
    Region("113305005", "T-A6000", "Cerebellum", "brain"),
    Region("29836001", "T-D2500", "Hip", "hip"),
    Region("24136001", "T-15710", "Hip joint", "hip"),
    Region("72696002", "T-D9200", "Knee", "knee"),
    Region("64234005", "T-12730", "Patella", "knee"),
    Region("49076000", "T-15720", "Knee joint", "knee"),
    Region("16982005", "T-D2220", "Shoulder", "shoulder"),
    Region("421060004", "T-D04FF", "Spine", "spine"),
    Region("122494005", "T-11501", "Cervical spine", "spine"),
    Region("122495006", "T-11502", "Thoracic spine", "spine"),
    Region("122496007", "T-11503", "Lumbar spine", "spine"),
    Region("1217253001", None, "Lumbo-sacral spine", "spine"),
    Region("1217256009", None, "Thoraco-lumbar spine", "spine"),
    Region("1217257000", None, "Cervico-thoracic spine", "spine"),
    Region("1217254007", None, "Sacro-coccygeal Spine", "spine"),
    Region("69748006", "T-B6000", "Thyroid", "thyroid"),
    Region("81745001", "T-AA000", "Eye", "eye"),
    Region("371398005", "T-D0801", "Eye region", "eye"),
    Region("28726007", "T-AA200", "Cornea", "eye"),
    Region("18619003", "T-AA110", "Sclera", "eye"),
    Region("5665001", "T-AA610", "Retina", "eye"),
    Region("76752008", "T-04000", "Breast", "breast"),
    Region("85562004", "T-D8700", "Hand", "hand"),
    Region("7569003", "T-D8800", "Finger", "hand"),
    Region("76505004", "T-D8810", "Thumb", "hand"),
    Region("110517009", "T-11011", "Vertebral column and cranium", None),
    Region("774007", "T-D1000", "Head and Neck", None),
    Region("45048000", "T-D1600", "Neck", None),
    Region("89545001", "T-D1200", "Face", None),
    Region("80891009", "T-32000", "Heart", None),
    Region("15825003", "T-42000", "Aorta", None),
    Region("74670003", "T-15460", "Wrist joint", None),
    Region("16953009", "T-15430", "Elbow joint", None),
    Region("14975008", "T-D8500", "Forearm", None),
    Region("40983000", "T-D8200", "Upper arm", None),
    Region("68367000", "T-D9100", "Thigh", None),
    Region("30021000", "T-D9400", "Lower leg", None),
    Region("71341001", "T-12710", "Femur", None),
    Region("85050009", "T-12410", "Humerus", None),
    Region("51299004", "T-12310", "Clavicle", None),
    Region("79601000", "T-12280", "Scapula", None),
    Region("38266002", "T-D0010", "Entire body", None),
    Region("66019005", "T-D0300", "Extremity", None),
    Region("53120007", "T-D8000", "Upper limb", None),
    Region("61685007", "T-D9000", "Lower limb", None),
    Region("416550000", "R-FAB55", "Chest and Abdomen", None),
    Region("416775004", "R-FAB56", "Chest, Abdomen and Pelvis", None),
    Region("416319003", "R-FAB54", "Neck, Chest, Abdomen and Pelvis", None),
    Region("417437006", "R-FAB52", "Neck and Chest", None),
    Region("416152001", "R-FAB53", "Neck, Chest and Abdomen", None),
    Region("72410000", "T-D3300", "Mediastinum", None),
    Region("363654007", "T-D14AE", "Orbital structure", None),
    Region("56873002", "T-11210", "Sternum", None),
    Region("113197003", "T-11300", "Rib", None),
    Region("41801008", "T-43000", "Coronary artery", None),
    Region("70925003", "T-11170", "Maxilla", None),
    Region("91609006", "T-11180", "Mandible", None),
    Region("661005", "T-D1213", "Jaw region", None),
    Region("53620006", "T-15290", "Temporomandibular joint", None),
    Region("2095001", "T-22000", "Paranasal sinus", None),
    Region("40689003", "T-94000", "Testis", None),
    Region("20233005", "T-98000", "Scrotum", None),
    Region("32849002", "T-56000", "Esophagus", None),
    Region("4596009", "T-24100", "Larynx", None),
    Region("54066008", "T-55000", "Pharynx", None),
    Region("39723000", "T-15680", "Sacroiliac joint", None),
    Region("54735007", "T-11AD0", "Sacrum", None),
    Region("64688005", "T-11BF0", "Coccyx", None),
)
REGIONS: dict[tuple[str, str], Region] = {
    **{("SCT", region.sct): region for region in _REGIONS},
    **{(scheme, region.srt): region for region in _REGIONS if region.srt for scheme in ("SRT", "SNM3", "99SDM")},
}

# The first words of a Manufacturer value, as files have it -> the name we write.
_MANUFACTURERS = {
    "Acuson": ("acuson",),
    "Agfa": ("agfa",),
    "Aloka": ("aloka", "hitachi aloka"),
    "BK Medical": ("bk medical", "b k medical"),
    "Bruker": ("bruker",),
    "Canon": ("canon",),
    "Carestream": ("carestream", "kodak", "eastman kodak"),
    "Elekta": ("elekta",),
    "Esaote": ("esaote",),
    "Fujifilm": ("fuji", "fujifilm"),
    "GE": ("ge", "g e", "gems", "general electric"),
    "Heidelberg Engineering": ("heidelberg",),
    "Hitachi": ("hitachi",),
    "Hologic": ("hologic", "lorad"),
    "Konica Minolta": ("konica", "konicaminolta"),
    "Kowa": ("kowa",),
    "Mindray": ("mindray", "shenzhen mindray"),
    "Neusoft": ("neusoft",),
    "Nidek": ("nidek",),
    "Optos": ("optos",),
    "Optovue": ("optovue",),
    "Philips": ("philips",),
    "Picker": ("picker",),
    "Planmeca": ("planmeca",),
    "Samsung": ("samsung", "medison", "samsung medison"),
    "Shimadzu": ("shimadzu",),
    "Siemens": ("siemens",),
    "SonoSite": ("sonosite", "fujifilm sonosite"),
    "SuperSonic Imagine": ("supersonic",),
    "Swissray": ("swissray",),
    "Topcon": ("topcon",),
    "Toshiba": ("toshiba",),
    "United Imaging": ("uih", "united imaging"),
    "Varian": ("varian",),
    "Zeiss": ("zeiss", "carl zeiss"),
}
MANUFACTURERS: dict[tuple[str, ...], str] = {
    tuple(alias.split()): name for name, aliases in _MANUFACTURERS.items() for alias in aliases
}


def plain(value: str) -> str:
    """A code string as it is looked up: capitals, without spaces, hyphens and underscores.

    >>> plain("C-Spine "), plain("WHOLE BODY")
    ('CSPINE', 'WHOLEBODY')
    """
    return value.upper().translate({ord(character): None for character in " -_"})


def manufacturer(value: str) -> str | None:
    """The canonical name of a known manufacturer, by the value's first words, the longest first.

    >>> manufacturer("G.E. Medical Systems"), manufacturer("TOSHIBA_MEC"), manufacturer("Dr. Smith")
    ('GE', 'Toshiba', None)
    """
    words = tuple("".join(character if character.isalnum() else " " for character in value.lower()).split()[:3])
    for count in (2, 1):
        if words[:count] in MANUFACTURERS:
            return MANUFACTURERS[words[:count]]
    return None
