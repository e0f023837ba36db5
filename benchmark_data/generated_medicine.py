# ruff: noqa: E501, RUF100 - sentences are kept whole, so that they can be read
"""Medical exercises: bedside calculations with the usual formulas, and vignettes from a table of textbook pictures.

Exercises for telling domains apart, not advice: values are drawn at random within plausible ranges.
"""

from __future__ import annotations

from math import sqrt

from generated import Family

JOBS = ("welder", "teacher", "farmer", "nurse", "courier", "retired miner", "baker", "student", "carpenter", "pilot", "seamstress", "clerk")


def _patient(r, low=19, high=86):
    woman, age = r.random() < 0.5, r.randint(low, high)
    return (f"A {age}-year-old {r.choice(JOBS)}" if age < 66 else f"A {age}-year-old {'woman' if woman else 'man'}"), ("she" if woman else "he"), ("her" if woman else "his"), age, woman


def _a(text):
    return text.replace("A 8", "An 8").replace("A 18-", "An 18-").replace("A 11-", "An 11-")


def anion_gap(r):
    who, *_ = _patient(r)
    na, cl, bic, alb = r.randint(128, 146), r.randint(92, 112), r.randint(7, 22), r.choice((2.0, 2.5, 3.0, 4.0))
    gap = na - cl - bic
    fixed = gap + 2.5 * (4 - alb)
    cause = r.choice(("was found drowsy beside an empty bottle", "has had vomiting and deep breathing for a day", "has had watery stools for five days", "stopped taking insulin last week"))
    question = (f"{who} {cause}. Sodium is {na} mmol/L, chloride {cl}, bicarbonate {bic}, and albumin {alb} g/dL. " + r.choice((
        "Calculate the anion gap and correct it for albumin. What kind of acidosis is this?", "Is the gap raised once albumin is allowed for?")))
    high = fixed > 12
    working = (f"The gap is {na} - ({cl} + {bic}) = {gap} mmol/L. Each gram of albumin below 4 hides about 2.5 mmol/L, so the corrected gap is {gap} + 2.5 x {4 - alb:.1f} = {fixed:.1f}. "
               + ("Above 12 there are unmeasured acids: think of ketones, lactate, uraemia, salicylate, methanol and ethylene glycol, and measure the osmolar gap."
                  if high else "It is not above 12, so chloride has taken the place of lost bicarbonate: diarrhoea, saline infusion or renal tubular acidosis."))
    return _a(question), working, f"{fixed:.1f} mmol/L"


def creatinine_clearance(r):
    who, _, her, age, woman = _patient(r, 40, 89)
    kg, cr, full = r.randint(45, 105), r.randint(7, 34) / 10, r.choice((400, 500, 750, 1000))
    clear = (140 - age) * kg / (72 * cr) * (0.85 if woman else 1)
    dose = full if clear >= 50 else full // 2 if clear >= 20 else full // 4
    ill = r.choice(("pyelonephritis", "cellulitis of the leg", "pneumonia", "an infected hip prosthesis"))
    question = (f"{who} of {kg} kg ({'female' if woman else 'male'}) is admitted with {ill}. Serum creatinine is {cr} mg/dL and stable. The chosen drug is given at {full} mg twice daily, at half that dose "
                f"when creatinine clearance is below 50 mL/min, and at a quarter below 20. Which dose is right by the Cockcroft-Gault estimate?")
    working = (f"Clearance is (140 - {age}) x {kg} / (72 x {cr})" + (" x 0.85 for a woman" if woman else "") + f" = {clear:.0f} mL/min. "
               + ("The full dose can be given." if clear >= 50 else "Half the dose is enough." if clear >= 20 else "Only a quarter of the dose is safe.")
               + f" That is {dose} mg twice daily. Creatinine alone misleads in the old and thin, whose muscles make little of it; repeat it in two days and ask about ibuprofen, which would lower {her} filtration further.")
    return _a(question), working, f"{dose} mg"


def sodium_excretion(r):
    who, _, her, *_ = _patient(r, 30)
    una, pna, ucr, pcr = r.randint(6, 90), r.randint(130, 146), r.randint(20, 160), r.randint(16, 60) / 10
    fena = una * pcr / (pna * ucr) * 100
    story = r.choice(("three days of vomiting", "a long operation on the aorta", "a course of gentamicin", "a fall and a night on the floor"))
    question = (f"After {story}, {who[0].lower() + who[1:]} passes 250 mL of urine in a day. Urine sodium is {una} mmol/L and urine creatinine {ucr} mg/dL; plasma sodium is {pna} and creatinine {pcr}. "
                f"What is the fractional excretion of sodium, and does it point to poor perfusion or to tubular damage?")
    working = (f"The fraction is ({una} x {pcr}) / ({pna} x {ucr}) = {fena:.2f}%. " + (
        f"Below 1% the tubules still hold on to salt: they work, and lack blood. Give fluid and look at {her} pressure and lactate." if fena < 1 else
        "Above 2% the tubules let salt go although the body needs it, as in acute tubular necrosis; look for muddy brown casts and stop toxic drugs." if fena > 2 else
        "Between 1 and 2% the test does not decide; examine the sediment and the response to fluid.") + " After a loop diuretic use urea in place of sodium.")
    return _a(question), working, f"{fena:.2f}%"


def corrected_calcium(r):
    who, she, _, *_ = _patient(r, 35)
    ca, alb, pth = r.randint(76, 122) / 10, r.randint(18, 42) / 10, r.randint(4, 180)
    true = ca + 0.8 * (4 - alb)
    level = "high" if true > 10.5 else "low" if true < 8.5 else "normal"
    sign = r.choice(("has been tired and constipated", "complains of tingling lips", "had a kidney stone last month", "was confused this morning"))
    why = {"high": "Parathyroid hormone that is not suppressed means the glands drive it; a suppressed one turns attention to cancer, sarcoid or vitamin D." ,
           "low": "With a high hormone think of renal failure or lack of vitamin D; with a low one, of neck surgery or magnesium.",
           "normal": "The raw figure misled, since about half of serum calcium rides on albumin; nothing needs treatment."}[level]
    question = (f"{who} {sign}. Total calcium is {ca} mg/dL (8.5 to 10.5) with an albumin of {alb} g/dL; parathyroid hormone is {pth} pg/mL (15 to 65). Is the calcium really abnormal, and what does the hormone add?")
    working = (f"Corrected calcium = {ca} + 0.8 x (4 - {alb}) = {true:.2f} mg/dL, which is {level}. The hormone, at {pth}, is {'below' if pth < 15 else 'above' if pth > 65 else 'within'} its range. {why}"
               f" An ionised calcium settles doubts when {she} is acidotic or very ill.")
    return _a(question), working, f"{true:.2f} mg/dL, {level}"


def oxygen_gradient(r):
    who, _, _, age, _ = _patient(r)
    co2, o2 = r.randint(25, 75), r.randint(45, 88)
    alveolar = 0.21 * (760 - 47) - co2 / 0.8
    gap, usual = alveolar - o2, age / 4 + 4
    if gap < 0:
        co2 = 40
        alveolar = 0.21 * 713 - 50
        gap = alveolar - o2
    raised = gap > usual
    question = (f"{who} is brought in short of breath {r.choice(('after a long flight', 'after swallowing opioid tablets', 'with fever and rusty sputum', 'from a smoky kitchen', 'in the third week of leg weakness'))}. "
                f"Breathing room air at sea level, arterial oxygen is {o2} mmHg and carbon dioxide {co2}. Work out the alveolar-arterial gradient. Is the lung at fault, or the pump?")
    working = (f"Alveolar oxygen is 0.21 x (760 - 47) - {co2}/0.8 = {alveolar:.0f} mmHg. Subtracting {o2} leaves a gradient of {gap:.0f}; at {age} years up to about {usual:.0f} is usual. "
               + (f"It is raised, so blood passes through lung that does not oxygenate it: pneumonia, embolism, oedema, shunt. {'Carbon dioxide is high as well, so ventilation fails too.' if co2 > 45 else 'Low or normal carbon dioxide shows that drive is not the trouble.'}"
                  if raised else "It is normal. The lung itself is sound; too little air is moved, from drugs, weak muscles or a stiff chest. Support ventilation and treat the cause."))
    return _a(question), working, f"{gap:.0f} mmHg"


def predictive_value(r):
    sick, sens, spec, n = r.choice((1, 2, 5, 10, 20)), r.randint(70, 98), r.randint(75, 99), r.choice((1000, 2000, 10000))
    ill = r.choice(("coeliac disease", "bowel cancer", "latent tuberculosis", "chlamydia", "hepatitis C", "thyroid disease"))
    place = r.choice(("a walk-in clinic", "a prison", "a university health service", "a village practice"))
    cases = n * sick // 100
    tp, fp = cases * sens / 100, (n - cases) * (100 - spec) / 100
    ppv, npv = tp / (tp + fp), (n - cases - fp) / (n - cases - fp + cases - tp)
    question = (f"{place[0].upper() + place[1:]} screens {n} people for {ill}; {sick} in a hundred have it. The test finds {sens}% of those affected and is negative in {spec}% of the others. "
                + r.choice(("If your result is positive, how likely are you to be ill?", "What are the positive and negative predictive values?")))
    working = (f"{cases} people are affected and {n - cases} are not. Of the affected {tp:.0f} test positive and {cases - tp:.0f} are missed; of the rest {fp:.0f} test positive wrongly. "
               f"So {tp:.0f} of {tp + fp:.0f} positives are right: {ppv:.1%}. A negative is right in {npv:.2%}. "
               + ("Most alarms are false because the illness is rare; confirm before treating." if ppv < 0.5 else "A positive result deserves action, though some alarms are false.")
               + " In a clinic that sees more of it the same test would look better.")
    return question, working, f"{ppv:.1%}"


def child_dose(r):
    age, per, conc = r.randint(1, 9), r.choice((10, 15, 20, 30, 45)), r.choice((25, 50, 80))
    kg = 2 * age + 8 + r.randint(-2, 4)
    times, most = r.choice((2, 3, 4)), r.choice((500, 750, 1000))
    day = kg * per * (2 if times > 2 else 1)
    one = min(day / times, most)
    drug, ill = r.choice((("an antibiotic", "a red, bulging eardrum"), ("a fever medicine", "a cold and a temperature of 39.4"), ("an anticonvulsant", "absence seizures"), ("an iron syrup", "pallor from too much cow's milk")))
    question = (f"A child of {age} who weighs {kg} kg has {ill}. The formulary gives {per * (2 if times > 2 else 1)} mg/kg a day of {drug} in {times} doses, at most {most} mg a dose. The bottle contains {conc} mg in each millilitre. "
                f"How many millilitres is one dose? The mother has a 5 mL spoon and asks if it will do.")
    working = (f"A day's amount is {kg} x {per * (2 if times > 2 else 1)} = {day} mg, so a dose is {day / times:.0f} mg" + (f", cut to the ceiling of {most}" if day / times > most else f", under the ceiling of {most}")
               + f". At {conc} mg/mL that is {one / conc:.1f} mL, {times} times a day. A spoon holds {5 * conc} mg when full, "
               + ("more than twice the dose" if 5 * conc > 2 * one else "more than the dose" if 5 * conc > one else "no more than the dose") + "; hand out an oral syringe marked in tenths, and write the volume, not only the weight, on the label.")
    return question, working, f"{one / conc:.1f} mL"


def corrected_sodium(r):
    who, _, her, _, woman = _patient(r)
    na, glu, kg = r.randint(118, 148), r.randint(320, 1150), r.randint(48, 100)
    true = na + 1.6 * (glu - 100) / 100
    osm = 2 * na + glu / 18
    water = 0.5 * kg * (true / 140 - 1) if woman else 0.6 * kg * (true / 140 - 1)
    question = (f"{who}, {'female' if woman else 'male'}, {kg} kg, with diabetes is {r.choice(('thirsty and drowsy', 'confused, with a dry tongue', 'weak and passing much urine'))}. Glucose is {glu} mg/dL and measured sodium {na} mmol/L; there are no ketones. "
                f"What would sodium be at a normal glucose, how concentrated is {her} plasma, and is water missing?")
    working = (f"Glucose draws water out of cells and dilutes sodium by 1.6 for each 100 mg/dL: {na} + 1.6 x {(glu - 100) / 100:.1f} = {true:.0f} mmol/L. Effective osmolality is 2 x {na} + {glu}/18 = {osm:.0f} mosm/kg, "
               + ("enough to cloud consciousness. " if osm > 320 else "not enough by itself to explain stupor. ")
               + (f"Against 140, about {water:.1f} litres of water are missing; replace half in the first day, after restoring the circulation with saline." if true > 141 else "There is no lack of free water; saline and insulin will do."))
    return _a(question), working, f"{true:.0f} mmol/L"


def qt_interval(r):
    who, _, her, _, woman = _patient(r, 20)
    qt, rate = r.randint(340, 520), r.randint(48, 104)
    qtc = qt / sqrt(60 / rate)
    limit = 460 if woman else 450
    drug = r.choice(("methadone", "haloperidol", "erythromycin", "sotalol", "citalopram", "ondansetron"))
    question = (f"{who} ({'female' if woman else 'male'}) takes {drug}. The electrocardiogram shows sinus rhythm at {rate} a minute and a QT interval of {qt} ms; potassium is {r.randint(28, 44) / 10} mmol/L. "
                f"Correct the interval for rate by Bazett's formula. Should the drug be changed?")
    working = (f"The interval between beats is 60/{rate} = {60 / rate:.2f} s, its root {sqrt(60 / rate):.3f}, so the corrected QT is {qt} / {sqrt(60 / rate):.3f} = {qtc:.0f} ms against an upper limit of {limit}. "
               + (f"Over 500 ms the danger of torsades is real: stop {drug}, keep {her} potassium above 4 and magnesium normal, and monitor." if qtc > 500 else
                  f"It is prolonged. Correct salts, look for a second culprit, and repeat the tracing; an alternative to {drug} is wise." if qtc > limit else f"It is within limits and {drug} may go on.")
               + (" At slow rates the formula errs low; at fast rates high." if not 60 <= rate <= 90 else ""))
    return _a(question), working, f"{qtc:.0f} ms"


_PICTURES = (
    ("giant cell arteritis", 71, "new headache over one temple, pain in the jaw on chewing and a sedimentation rate of 96", "prednisone at once, before the biopsy, to save sight", "migraine", "trigeminal neuralgia", "acute glaucoma"),
    ("acute cholecystitis", 46, "pain below the right ribs since a heavy supper, fever, and breath caught when the liver edge is pressed", "antibiotics and removal of the gallbladder within days", "duodenal ulcer", "basal pneumonia", "renal colic"),
    ("ectopic pregnancy", 27, "seven weeks without a period, one-sided pelvic pain, spotting, and an empty womb on ultrasound", "methotrexate or surgery, depending on stability", "appendicitis", "ovarian torsion", "threatened miscarriage"),
    ("pulmonary embolism", 58, "sudden breathlessness ten days after a hip operation, a swollen calf and a clear chest film", "anticoagulation without waiting when suspicion is high", "pneumothorax", "pericarditis", "heart attack"),
    ("myasthenia gravis", 33, "drooping lids and double vision that grow worse by evening and better with ice", "pyridostigmine, and imaging of the thymus", "multiple sclerosis", "botulism", "thyroid eye disease"),
    ("Addison's disease", 39, "months of weight loss, dizziness on standing, dark creases of the palms, low sodium and high potassium", "hydrocortisone and fludrocortisone for life", "anorexia", "haemochromatosis", "chronic diarrhoea"),
    ("coeliac disease", 24, "bloating, loose stools, iron deficiency that resists tablets, and blistering itch on the elbows", "a diet free of gluten", "lactose intolerance", "Crohn's disease", "giardiasis"),
    ("polymyalgia rheumatica", 74, "stiff shoulders and hips every morning for an hour, normal strength and a raised C-reactive protein", "low-dose prednisone, with relief in days", "polymyositis", "frozen shoulder", "hypothyroidism"),
    ("tension pneumothorax", 21, "a stab wound of the chest, a windpipe pushed to the left, no breath sounds on the right and falling pressure", "needle decompression before any film", "cardiac tamponade", "massive haemothorax", "flail chest"),
    ("Guillain-Barré syndrome", 44, "legs that grew weak from the feet upward two weeks after gastroenteritis, with lost reflexes", "immunoglobulin or plasma exchange, and measuring vital capacity", "spinal cord compression", "hypokalaemia", "tick paralysis"),
    ("bacterial meningitis", 19, "fever, stiff neck and purple spots that do not fade under glass", "ceftriaxone immediately, with dexamethasone", "viral meningitis", "subarachnoid bleeding", "heat stroke"),
    ("primary hyperaldosteronism", 42, "blood pressure of 176/104 on three drugs, cramps and a potassium of 2.9", "a renin ratio, then spironolactone or surgery", "renal artery stenosis", "phaeochromocytoma", "liquorice excess"),
    ("gout", 61, "a first toe that woke him at night, red and too tender for a sheet, after a feast", "colchicine or an anti-inflammatory drug; needle-shaped crystals prove it", "septic arthritis", "pseudogout", "stress fracture"),
    ("Graves' disease", 31, "tremor, weight loss in spite of hunger, heat intolerance and staring eyes", "methimazole and a beta blocker", "panic disorder", "thyroiditis", "phaeochromocytoma"),
)


def _vignette(r, plan):
    ill, age, picture, care, *others = r.choice(_PICTURES)
    age += r.randint(-4, 4)
    pulse, up, low, temp = r.randint(64, 118), r.randint(98, 158), r.randint(58, 92), r.randint(364, 394) / 10
    history = r.choice(("Earlier records show nothing but a broken wrist.", "The father died of a stroke at eighty.", "There are no known allergies.", "Smoking stopped ten years ago.", "A cat lives in the house.",
                        "Vaccinations are up to date.", "The patient drinks wine on Sundays."))
    choices = r.sample([ill, *others], 4)
    listed = "; ".join(f"({mark}) {name}" for mark, name in zip("ABCD", choices, strict=True))
    right = "ABCD"[choices.index(ill)]
    vital = f"Pulse {pulse}, blood pressure {up}/{low}, temperature {temp}."
    job = r.choice(JOBS)
    if plan == 0:
        question = f"A {job} aged {age} comes to the clinic with {picture}. {history} {vital} Which diagnosis fits best? {listed}"
        working = (f"The findings belong together: {picture}. {ill[0].upper() + ill[1:]} explains every one of them. {others[0][0].upper() + others[0][1:]} and {others[1]} would each leave something out, and {others[2]} "
                   f"usually runs another course. Answer {right}. What to do: {care}.")
    elif plan == 1:
        question = f"On the evening round you see a patient of {age}. {vital} The student reports {picture}. {history} What is the next step, and for which illness? {listed}"
        working = (f"Name the illness first. The pattern speaks for {ill}, choice {right}; {others[1]} was considered, as was {others[0]}, but neither gives this combination. Then act: {care}. Delay for "
                   f"tests that only confirm would be an error here, while {others[2]} can be ruled out later.")
    else:
        question = f"A letter from a colleague: 'Dear doctor, please see this {job}, {age}, for {picture}. I thought of {others[0]}. {history}' On arrival: {vital.lower()} Do you agree? {listed}"
        working = (f"Not quite. {others[0][0].upper() + others[0][1:]} shares some of these features, yet the whole picture is that of {ill} ({right}). Reply to the colleague that management is {care}, "
                   f"and that {others[1]} and {others[2]} were thought of and found less likely on history alone.")
    return _a(question), working, right


def vignette_clinic(r):
    return _vignette(r, 0)


def vignette_round(r):
    return _vignette(r, 1)


def vignette_letter(r):
    return _vignette(r, 2)


MEDICINE: dict[str, Family] = {f.__name__: f for f in (
    anion_gap, creatinine_clearance, sodium_excretion, corrected_calcium, oxygen_gradient, predictive_value, child_dose, corrected_sodium, qt_interval,
    vignette_clinic, vignette_round, vignette_letter)}
