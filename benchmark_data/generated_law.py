# ruff: noqa: E501, RUF100 - sentences are kept whole, so that they can be read
"""Invented rules of law applied to drawn facts: twelve families. Each item states the rule it applies."""

from __future__ import annotations

from datetime import date, timedelta

from generated import PEOPLE, Family, two

STATES = ("Arden", "Belmora", "Cassia", "Dunmore", "Estoria", "Fallow", "Glenn", "Havelock")
"""Invented jurisdictions: no item says what the law of a real place is."""


def _day(d):
    return f"{d.day} {d:%B} {d.year}"


def limitation(r):
    a, b = two(r)
    state, years, found_rule = r.choice(STATES), r.randint(2, 6), r.random() < 0.5
    act = date(r.randint(2001, 2015), r.randint(1, 12), r.randint(1, 28))
    found = act + timedelta(days=r.randint(30, 1500))
    suit = act + timedelta(days=r.randint(years * 365 - 500, years * 365 + 1600))
    start = found if found_rule else act
    end = date(start.year + years, start.month, 28 if (start.month, start.day) == (2, 29) else start.day)
    wrong = r.choice(("laid a drain badly", "certified a roof as sound", "misread an X-ray", "surveyed the wrong boundary", "audited false books"))
    question = (f"Under the Limitation Act of {state} an action for negligence must be brought within {years} years of the day on which "
                + ("the claimant discovered the harm." if found_rule else "the negligent act was done, whether or not anyone knew of it.")
                + f" On {_day(act)} {a} {wrong}. {b} found out on {_day(found)} and filed a claim on {_day(suit)}. Is the claim barred?")
    working = (f"Time runs from {'discovery' if found_rule else 'the act'}, {_day(start)}, and ends {years} years later, on {_day(end)}. "
               f"The date of {'the act' if found_rule else 'discovery'} does not matter under this statute. Filed on {_day(suit)}, the claim "
               + ("is in time and goes to trial on the merits." if suit <= end else f"comes {(suit - end).days} days late; {a} may plead limitation."))
    return question, working, "barred" if suit > end else "not barred"


def offer_and_acceptance(r):
    a, b = two(r)
    good, price, sent = r.choice(("a violin", "forty sacks of barley", "a fishing licence", "an antique clock", "a trailer")), r.randint(3, 90) * 100, r.randint(3, 12)
    revoked, mailed, state = sent + r.randint(1, 5), sent + r.randint(1, 5), r.choice(STATES)
    arrives = revoked + r.randint(1, 3)
    valid = mailed < arrives
    question = (f"In {state} an acceptance takes effect when it is posted, a revocation only when it reaches the offeree. On {sent} May {a} offers by letter "
                f"to sell {b} {good} for {price} dollars, open until further notice. On {revoked} May {a} posts a letter withdrawing the offer, which "
                f"arrives on {arrives} May. {b} posts an acceptance on {mailed} May; it reaches {a} on {mailed + 4} May. "
                + r.choice(("Is there a contract?", f"Can {b} insist on delivery?", f"Is {a} bound?")))
    working = (f"The offer stood until the withdrawal was received, that is until {arrives} May; posting it on {revoked} May changed nothing. "
               f"The acceptance counted from {mailed} May, "
               + (f"while the offer was alive, so a contract for {good} came about on that day, although {a} learned of it later. {b} may sue for performance."
                  if valid else f"when there was nothing left to accept. The letter is at most a new offer, which {a} is free to refuse."))
    return question, working, "contract" if valid else "no contract"


def comparative_fault(r):
    a, b = two(r)
    harm, share, bar, state = r.randint(8, 90) * 1000, r.randint(2, 18) * 5, r.choice((50, 51, 101)), r.choice(STATES)
    rule = {50: "recovers nothing if at least half of the fault is his or hers", 51: "recovers nothing if more than half of the fault is his or hers",
            101: "always recovers, however large his or her own share"}[bar]
    lost = share >= 50 if bar == 50 else share > 50 if bar == 51 else False
    event = r.choice(("collide at a crossing", "crash their bicycles", "meet on an icy stair, and both fall", "reverse into each other in a yard"))
    got = 0 if lost else harm * (100 - share) // 100
    question = (f"{a} and {b} {event}. {a} suffers damage of {harm} dollars. The jury puts {share}% of the fault on {a} and the rest on {b}. The Civil Code "
                f"of {state} reduces damages by the claimant's share of fault; a claimant {rule}. What does {a} recover?")
    working = (f"The damage is not disputed, nor that {b}'s {100 - share}% caused part of it. First the threshold: {a}'s share is {share}%, and the code says a "
               f"claimant {rule}. " + (f"The bar applies, and the claim fails entirely although {b} was careless too." if lost else
               f"The bar does not apply. Damages shrink by {share}%: {harm} x {100 - share}/100 = {got} dollars."))
    return question, working, f"{got} dollars"


def hearsay(r):
    a, b = two(r)
    state = r.choice(STATES)
    kind, says, told, ok = r.choice((
        ("excited utterance", "'The brake cable snapped!'", f"shouted by a passenger seconds after the crash, still trembling, and repeated in court by {b}", True),
        ("statement of an opponent", "'I never checked the ladder.'", f"said by the defendant {a} to a neighbour, who testifies for the claimant", True),
        ("no exception", "'My cousin says the wall was cracked for months.'", f"written by {a} in a letter a year after the collapse and offered by {a}'s own counsel", False),
        ("medical purpose", "'The pain began after I drank from the green bottle.'", f"told to a nurse by {a} while being treated", True),
        ("not for its truth", "'Watch out, the floor is wet.'", f"heard by {b} before slipping, and offered only to show that a warning was given", True),
        ("no exception", "'The foreman took the money.'", f"told by {b} to a friend at dinner; {b} is abroad and will not testify", False)))
    question = (f"The Evidence Code of {state} shuts out statements made outside court when offered to prove that what they say is true, except statements of the "
                "opposing party, excited utterances about a startling event, and statements made for medical treatment. At trial a party offers the words "
                f"{says}, {told}. Counsel objects: hearsay. How should the judge rule?")
    working = ("Ask first what the words are to prove. " + ("Here they matter because they were spoken and heard, whether or not they were true; the rule is not "
               "engaged at all. " if kind == "not for its truth" else "Here they help only if they are true, so they need an exception. ")
               + (f"One fits: {kind}. " if ok and kind != "not for its truth" else "" if ok else "The speaker was calm, is not the opponent, and sought no treatment; "
               "nothing in the list fits, and there can be no cross-examination. ")
               + ("The objection is overruled; weight is for the jury." if ok else "The objection is sustained."))
    return question, working, "admissible" if ok else "inadmissible"


def adverse_possession(r):
    a, b = two(r)
    state, years, kept, asked, gap = r.choice(STATES), r.choice((7, 10, 12, 15)), r.randint(5, 22), r.random() < 0.35, r.random() < 0.35
    strip = r.choice(("a strip of orchard", "an old boathouse", "half a driveway", "a walled garden", "a paddock"))
    wins = kept >= years and not asked and not gap
    question = (f"Whoever in {state} occupies land openly, without the owner's leave and without interruption for {years} years becomes its owner. {a} fenced in "
                f"{strip} that the register shows as {b}'s, and has used it for {kept} years. "
                + (f"In the second year {b} wrote: 'You may use it until I need it.' {a} thanked {b}. " if asked else f"{b} lived next door and never spoke of it. ")
                + (f"For one whole winter, halfway through, {a} moved away and {b} stored timber there. " if gap else "Neighbours saw the work every season. ")
                + f"{b} now wants the land back. Who owns it?")
    reasons = [text for fails, text in ((kept < years, f"{kept} years fall short of {years}"), (asked, "use by permission is not adverse"),
                                        (gap, "the owner's re-entry broke the period, which began anew")) if fails]
    working = (f"The elements are openness, absence of leave, continuity and {years} years. A fence is open enough. "
               + (f"All the rest is met too: nobody allowed the use, nothing interrupted it, and {kept} years is enough. Title passes to {a} by law; the register "
                  "must follow." if wins else f"But {', and '.join(reasons)}. {b} keeps title and may recover possession."))
    return question, working, a if wins else b


def frauds(r):
    a, b = two(r)
    state, floor, price, months, written, part = r.choice(STATES), r.choice((500, 1000, 5000)), r.randint(2, 95) * 100, r.randint(3, 24), r.random() < 0.3, r.random() < 0.3
    work = r.random() < 0.5
    need = months > 12 if work else price >= floor
    binding = written or not need or part
    deal = f"to work as {r.choice(('a gardener', 'a tutor', 'a bookkeeper'))} for {months} months" if work else f"to sell {r.choice(('a piano', 'a horse', 'a kiln', 'a used tractor'))} for {price} dollars"
    question = (f"By the Writing Act of {state}, contracts that cannot be performed within twelve months, and sales of goods for {floor} dollars or more, bind nobody "
                f"unless the party to be charged signed a writing or performance was accepted. {a} and {b} agree by telephone: {a} is {deal}. "
                + (f"{b} signs a short note of the terms the same day. " if written else "Nothing is ever written down. ")
                + (f"{b} accepts {'two weeks of service' if work else 'a first delivery, keeps it and pays a part'}. " if part else f"Before anything is done {b} walks away. ")
                + f"May {a} enforce the deal against {b}?")
    working = ((f"Service for {months} months {'cannot' if months > 12 else 'can'} be finished within a year" if work else f"A price of {price} is {'not ' if price < floor else ''}within the {floor}-dollar rule")
               + f", so a writing is {'' if need else 'not '}needed. "
               + ("The oral promise is good as it stands; only proof may be hard." if not need else f"{b}'s signed note satisfies the Act." if written else
                  f"There is none, but {b} accepted performance, which the Act treats alike." if part else f"There is none, and nothing was performed: {b} has a complete defence.")
               + (" Enforceable." if binding else " Unenforceable."))
    return question, working, "yes" if binding else "no"


def notice_to_quit(r):
    a, b = two(r)
    state, days, weeks, given, service = r.choice(STATES), r.choice((28, 30, 60, 90)), r.choice((1, 4)), r.randint(20, 100), r.choice(("by post", "by hand", "under the door"))
    extra = 3 if service == "by post" else 0
    served = date(r.randint(2010, 2022), r.randint(1, 12), r.randint(1, 28))
    leave = served + timedelta(days=given)
    ok = given - extra >= days
    question = (f"A landlord in {state} may end a periodic tenancy by {days} clear days' notice. Notice sent by post counts as received three days after posting; any other "
                f"way, at once. {a} lets a flat to {b}, rent due every {weeks if weeks > 1 else ''} {'weeks' if weeks > 1 else 'week'}. On {_day(served)} {a} gives notice {service}, "
                f"telling {b} to leave by {_day(leave)}. {b} stays. Is {a} entitled to possession on that day?").replace("every  week", "every week")
    working = (f"From {_day(served)} to {_day(leave)} there are {given} days. " + (f"Posting takes off {extra}, which leaves {given - extra}. " if extra else f"Given {service}, the notice worked at once. ")
               + (f"That is not less than {days}. The tenancy ended, and {b} holds over without right. How often rent was due makes no difference."
                  if ok else f"That is {days - given + extra} short of {days}. A short notice is void; {a} must start again, and until then {b} owes rent but not the keys."))
    return question, working, "yes" if ok else "no"


def minors(r):
    a, b = two(r)
    age, state, necessary, ratified = r.randint(14, 17), r.choice(STATES), r.random() < 0.4, r.random() < 0.3
    thing = r.choice(("winter boots", "insulin", "school books", "a warm coat")) if necessary else r.choice(("a motor scooter", "a drum kit", "a gaming console", "a diamond ring"))
    price, worth = r.randint(6, 30) * 10, r.randint(3, 28) * 10
    result = "bound to pay a fair value" if necessary else "bound in full" if ratified else "free to withdraw"
    question = (f"In {state} a person under 18 may withdraw from a contract until a reasonable time after turning 18, but pays the fair value of necessaries and is bound by anything "
                f"confirmed after that birthday. {a}, aged {age}, buys {thing} from {b} on credit for {price} dollars; a fair value would be {min(worth, price)}. "
                + (f"A week after turning 18 {a} writes to {b}: 'I shall keep it and pay by June.' " if ratified else f"A month later, still {age}, {a} sends it back. ")
                + f"What does {a} owe?")
    working = (f"{a} was {age}, so the contract can be undone unless one of two exceptions helps {b}. " + (
        f"The purchase was a necessary of life, for which the statute charges its fair value, {min(worth, price)} dollars, and not the price as such." if necessary else
        f"It was no necessary, but the letter came after majority and confirms the bargain: {price} dollars are due." if ratified else
        f"It was no necessary and nothing was confirmed. Returning the goods ends the matter; {a} owes nothing, and {b} carries the wear."))
    return question, working, result


def jurisdiction(r):
    a, b = two(r)
    c = r.choice([p for p in PEOPLE if p not in (a, b)])
    sa, sb, sc = r.choice(STATES), r.choice(STATES), r.choice(STATES)
    floor, sum_ = r.choice((50, 75, 100)) * 1000, r.randint(20, 160) * 1000
    ok = sa not in (sb, sc) and sum_ > floor
    question = (f"The Union Court hears disputes between citizens of different states if more than {floor} dollars are at stake and no claimant shares a state with any defendant. "
                f"{a}, a citizen of {sa}, sues {b} of {sb} and {c} of {sc} together for {sum_} dollars after "
                + r.choice(("a warehouse fire", "a failed merger", "a ski accident", "a spoiled cargo of tea")) + ". The defendants move to dismiss. Does the court have jurisdiction?")
    shared = [n for n, s in ((b, sb), (c, sc)) if s == sa]
    working = (f"Amount: {sum_} is {'more' if sum_ > floor else 'not more'} than {floor}. Citizenship: {a} is from {sa}; the defendants are from {sb} and {sc}. "
               + (f"{' and '.join(shared)} share{'s' if len(shared) == 1 else ''} the claimant's state, which destroys complete diversity. " if shared else
                  "Nobody on one side shares a state with anybody on the other; that the defendants might share one is irrelevant. ")
               + ("Both conditions hold: the motion is denied." if ok else f"The motion is granted; {a} may sue in the courts of {sb}."))
    return question, working, "yes" if ok else "no"


def self_defence(r):
    a, b = two(r)
    state, retreat, home, first, knife, hit = r.choice(STATES), r.random() < 0.5, r.random() < 0.4, r.random() < 0.25, r.random() < 0.4, r.choice(("a broken nose", "a cut on the arm", "a fractured wrist"))
    deadly = r.random() < 0.4
    fails = [t for f, t in ((first, f"{a} began the quarrel with a blow"), (deadly and not knife, "deadly force met a threat that was not deadly"),
                            (retreat and deadly and not home, "a safe way out was open and had to be taken before using deadly force")) if f]
    question = (f"The Penal Code of {state} excuses force that a person reasonably believes necessary against an imminent attack. The aggressor may not rely on it; deadly force needs a deadly "
                f"threat{', and outside the home one must first retreat if that is safe' if retreat else '; nobody need retreat'}. {'In the hall of his or her own flat' if home else 'Outside a bar, the street clear behind'}, "
                f"{a} {'strikes' if first else 'is insulted by'} {b}. {b} comes at {a} {'with a knife' if knife else 'with bare fists'}. {a} {'swings an iron bar at the head' if deadly else 'pushes back hard'}; {b} suffers {hit}. Is {a} guilty of assault?")
    working = ("The attack was imminent; the rest depends on who began, and on proportion. " + (f"The defence fails, because {' and '.join(fails)}. {a} is guilty, though provocation may lower the sentence."
               if fails else f"{a} did not begin it, and {'a bar against a knife' if deadly else 'a push against an assault'} is not out of proportion. "
               + ("Retreat was not asked for here. " if deadly else "") + f"{a} must be acquitted."))
    return question, working, "guilty" if fails else "not guilty"


def inheritance(r):
    a, b = two(r)
    state, estate, kids, spouse = r.choice(STATES), r.randint(12, 240) * 6000, r.randint(2, 5), r.random() < 0.7
    dead, grand = r.randint(0, 1), r.randint(2, 3)
    for_spouse = estate // (2 if spouse else 1) if spouse else 0
    rest = estate - for_spouse
    each = rest / kids
    question = (f"{a} dies in {state} without a will and leaves {estate:,} dollars after debts. " + (f"{b}, the surviving spouse, and " if spouse else f"The spouse {b} died earlier. There are ")
                + f"{kids} children " + ("are to be considered; " if spouse else "to be considered; ") + (f"one child died before {a} and left {grand} children. " if dead else "all of them are alive. ")
                + "The Succession Act gives a spouse one half, divides the remainder equally among children, and lets the issue of a dead child take that child's part. "
                  "How is the estate divided?")
    working = ((f"The spouse takes half, {for_spouse:,}. " if spouse else "With no spouse the whole estate goes to descendants. ")
               + f"What remains, {rest:,}, falls into {kids} parts of {each:,.0f}. "
               + (f"The part of the child who died is divided among {grand} grandchildren, {each / grand:,.0f} each; they step into the parent's place, so living children get no more than before. "
                  if dead else "No part lapses, since every child survived. ") + "Grandchildren whose own parent is alive take nothing.")
    return question, working, f"{each:,.0f} per child"


def privacy_consent(r):
    a, b = two(r)
    state, age, said, sold, days = r.choice(STATES), r.randint(11, 40), r.random() < 0.6, r.random() < 0.5, r.randint(5, 60)
    limit = r.choice((14, 30, 45))
    app = r.choice(("a running app", "a recipe site", "a dating service", "a toy with a microphone"))
    breaches = [t for f, t in ((not said, "no consent was given before data were taken"), (age < 16, f"at {age} only a parent could consent"),
                               (sold, "the data were passed on, which the consent did not cover"), (days > limit, f"erasure took {days} days instead of {limit}")) if f]
    question = (f"The Data Act of {state} asks for consent before personal data are collected (of a parent, if the user is under 16), forbids passing them on without a further consent, and grants erasure within "
                f"{limit} days of a request. {b} runs {app}. {a}, aged {age}, {'ticks a clear box' if said else 'is shown no notice'} and uses it daily. {b} {'sells the logs to an advertiser' if sold else 'keeps the logs in house'}. "
                f"{a} asks for deletion; the logs are gone after {days} days. Which duties were broken?")
    working = ("Go through the duties in turn: collection, age, disclosure, erasure. " + (f"Broken: {'; '.join(breaches)}. Each is a separate infringement, {len(breaches)} in all, and one does not cure another."
               if breaches else f"Consent was given by an adult or someone old enough, nothing left the house, and {days} days is within {limit}. There is no infringement to punish."))
    return question, working, f"{len(breaches)} breaches"


LAW: dict[str, Family] = {f.__name__: f for f in (
    limitation, offer_and_acceptance, comparative_fault, hearsay, adverse_possession, frauds, notice_to_quit, minors, jurisdiction, self_defence,
    inheritance, privacy_consent)}
