# ruff: noqa: E501, RUF100 - sentences are kept whole, so that they can be read
"""Finance problems with worked solutions: twelve families."""

from __future__ import annotations

from generated import FIRMS, PEOPLE, Family, two


def bond_price(r):
    firm, face, coupon, years, rate = r.choice(FIRMS), r.choice((1000, 5000, 10000)), r.randint(3, 9), r.randint(3, 6), r.randint(2, 10)
    pay = face * coupon / 100
    values = [pay / (1 + rate / 100) ** t for t in range(1, years + 1)]
    redeemed = face / (1 + rate / 100) ** years
    price = sum(values) + redeemed
    question = r.choice((
        f"{firm} issues a bond with a face value of {face} dollars. It pays a {coupon}% coupon once a year and matures in {years} years. "
        f"Investors ask for {rate}%. What is a fair price today?",
        f"What should you pay for a {years}-year note of {firm} with par {face} dollars, annual coupon {coupon}%, if comparable paper "
        f"yields {rate}%?"))
    rows = " ".join(f"Year {t}: {pay:.2f} / {1 + rate / 100:.2f}^{t} = {v:.2f}." for t, v in enumerate(values, 1))
    side = "above" if price > face + 0.005 else "below" if price < face - 0.005 else "at"
    working = (f"Each coupon is {coupon}% of {face}, so {pay:.2f} dollars. {rows} The principal is worth {redeemed:.2f} today. "
               f"Adding up gives {price:.2f} dollars, {side} par, as a coupon of {coupon}% against a yield of {rate}% suggests.")
    return question, working, f"{price:.2f}"


def loan_payment(r):
    who, sum_, rate, years = r.choice(PEOPLE), r.randint(12, 90) * 1000, r.choice((3, 4.5, 6, 7.5, 9)), r.randint(2, 7)
    i, n = rate / 1200, years * 12
    pay = sum_ * i / (1 - (1 + i) ** -n)
    thing = r.choice(("a delivery van", "a kitchen", "a dental chair", "a fishing boat", "solar panels", "a lathe"))
    question = (f"{who} borrows {sum_} dollars to buy {thing}. The lender charges {rate}% a year, compounded monthly, and wants equal "
                f"instalments at the end of every month for {years} years. " + r.choice((
                    "How large is one instalment, and how much interest is paid in all?", "Find the instalment and the total interest.")))
    first = sum_ * i
    working = (f"The monthly rate is {rate}/12 = {rate / 12:.4f}%, over {n} months. The annuity formula gives a payment of "
               f"{sum_} x {i:.6f} / (1 - {1 + i:.6f}^-{n}) = {pay:.2f} dollars. In month one {first:.2f} is interest and {pay - first:.2f} "
               f"repays principal; the interest part shrinks afterwards. Total paid: {n} x {pay:.2f} = {pay * n:.2f}. "
               f"Less the {sum_} borrowed, interest costs {pay * n - sum_:.2f} dollars.")
    return question, working, f"{pay:.2f}"


def net_present_value(r):
    firm, cost, rate = r.choice(FIRMS), r.randint(40, 200) * 10, r.randint(5, 14)
    flows = [r.randint(10, 90) * 10 for _ in range(r.randint(3, 5))]
    values = [f / (1 + rate / 100) ** t for t, f in enumerate(flows, 1)]
    npv = sum(values) - cost
    what = r.choice(("a second kiln", "new packaging software", "a cold store", "a press line", "a wind turbine"))
    question = (f"The board of {firm} considers {what} costing {cost} thousand dollars now. Management expects cash inflows of "
                f"{', '.join(map(str, flows))} thousand at the ends of the following years. At a cost of capital of {rate}%, "
                + r.choice(("does the project create value?", "should the board accept?", "what is its net present value?")))
    rows = "; ".join(f"year {t} {v:.1f}" for t, v in enumerate(values, 1))
    working = (f"Discounted at {rate}%, the inflows are worth (in thousands): {rows}. Together that is {sum(values):.1f}. Subtracting the outlay "
               f"of {cost} leaves {npv:.1f}. " + (f"A positive figure means the inflows repay the capital with {rate}% and more: accept."
               if npv > 0 else f"A negative figure means shareholders would earn less than {rate}%: reject."))
    return question, working, f"{npv:.1f} thousand"


def capital_asset_pricing(r):
    firm, other = two(r, FIRMS)
    rf, mrp, beta, dividend, growth = r.randint(1, 5), r.randint(4, 8), r.randint(6, 17) / 10, r.randint(10, 60) / 10, r.randint(1, 3)
    need = rf + beta * mrp
    price = dividend / (need - growth) * 100
    question = (f"Treasury bills return {rf}% and the market is expected to beat them by {mrp} percentage points. The share of {firm} has a beta "
                f"of {beta}; that of {other} has a beta of 1. {firm} will pay a dividend of {dividend:.2f} dollars next year, growing {growth}% "
                f"a year for ever. What return do shareholders require, and what is the share worth?")
    working = (f"By the capital asset pricing model the required return is {rf} + {beta} x {mrp} = {need:.1f}%. {other}, with beta 1, must return "
               f"{rf + mrp}%, so {firm} is {'riskier' if beta > 1 else 'safer' if beta < 1 else 'just as risky'}. The growing perpetuity is worth "
               f"{dividend:.2f} / ({need / 100:.3f} - {growth / 100:.2f}) = {price:.2f} dollars a share.")
    return question, working, f"{need:.1f}%; {price:.2f}"


def capital_cost(r):
    firm, equity, debt = r.choice(FIRMS), r.randint(20, 90) * 10, r.randint(10, 60) * 10
    re, rd, tax = r.randint(8, 14), r.randint(3, 7), r.choice((20, 21, 25, 28, 30))
    total = equity + debt
    wacc = equity / total * re + debt / total * rd * (1 - tax / 100)
    question = (f"{firm} is financed with equity worth {equity} million dollars and bonds worth {debt} million, both at market prices. "
                f"Shareholders expect {re}%, bondholders {rd}%, and profits are taxed at {tax}%. "
                + r.choice(("Compute the weighted average cost of capital.", "Which rate should it use to discount an average project?")))
    working = (f"Equity is {equity}/{total} = {equity / total:.1%} of the capital and debt {debt / total:.1%}. Interest is deductible, so after "
               f"tax the bonds cost {rd} x (1 - {tax / 100:.2f}) = {rd * (1 - tax / 100):.2f}%. The average is {equity / total:.3f} x {re} + "
               f"{debt / total:.3f} x {rd * (1 - tax / 100):.2f} = {wacc:.2f}%. A project as risky as the firm must return more than {wacc:.2f}%.")
    return question, working, f"{wacc:.2f}%"


def portfolio_risk(r):
    a, b = two(r, FIRMS)
    w, sa, sb, rho, ra, rb = r.randint(2, 8) * 10, r.randint(10, 35), r.randint(10, 35), r.choice((-30, 0, 20, 50, 80)) / 100, r.randint(4, 12), r.randint(4, 12)
    x = w / 100
    var = (x * sa) ** 2 + ((1 - x) * sb) ** 2 + 2 * x * (1 - x) * rho * sa * sb
    question = (f"An investor puts {w}% of her savings in {a} and the rest in {b}. The expected returns are {ra}% and {rb}%, the standard "
                f"deviations {sa}% and {sb}%, and the correlation is {rho}. Find expected return and volatility of the mix. "
                "Does diversification help?")
    plain = x * sa + (1 - x) * sb
    working = (f"The mean return is {x:.1f} x {ra} + {1 - x:.1f} x {rb} = {x * ra + (1 - x) * rb:.2f}%. The variance is ({x:.1f} x {sa})^2 + "
               f"({1 - x:.1f} x {sb})^2 + 2 x {x:.1f} x {1 - x:.1f} x {rho} x {sa} x {sb} = {var:.1f}, so volatility is {var ** 0.5:.2f}%. "
               f"With perfect correlation it would be {plain:.2f}%; holding both saves {plain - var ** 0.5:.2f} points.")
    return question, working, f"{x * ra + (1 - x) * rb:.2f}%; {var ** 0.5:.2f}%"


def currency_forward(r):
    firm, spot, home, abroad, months = r.choice(FIRMS), r.randint(80, 160) / 100, r.randint(1, 6), r.randint(1, 6), r.choice((3, 6, 9, 12))
    amount = r.randint(2, 30) * 100_000
    forward = spot * (1 + home * months / 1200) / (1 + abroad * months / 1200)
    question = (f"{firm} of Chicago will receive {amount:,} euros in {months} months. One euro costs {spot:.2f} dollars today; dollar deposits "
                f"earn {home}% a year and euro deposits {abroad}% (simple interest). At which forward rate is there no arbitrage, and how many "
                "dollars can the firm lock in?")
    working = (f"Over {months} months a dollar grows to {1 + home * months / 1200:.5f} and a euro to {1 + abroad * months / 1200:.5f}. Covered "
               f"interest parity sets the forward at {spot:.2f} x {1 + home * months / 1200:.5f} / {1 + abroad * months / 1200:.5f} = {forward:.4f}. "
               f"Selling the euros forward brings {amount:,} x {forward:.4f} = {amount * round(forward, 4):,.0f} dollars. The euro trades at a "
               f"{'premium' if forward > spot else 'discount' if forward < spot else 'par'} because dollar interest is "
               f"{'higher' if home > abroad else 'lower' if home < abroad else 'equal'}.")
    return question, working, f"{forward:.4f}"


def break_even(r):
    firm, fixed, price, variable, sold = r.choice(FIRMS), r.randint(30, 200) * 1000, r.randint(30, 90), r.randint(8, 25), r.randint(4, 12) * 1000
    good = r.choice(("lamps", "rucksacks", "thermostats", "board games", "teapots", "sensors"))
    margin = price - variable
    units = -(-fixed // margin)
    profit = sold * margin - fixed
    question = (f"{firm} sells {good} at {price} dollars apiece. Materials and labour come to {variable} dollars a piece, rent and salaries to "
                f"{fixed} dollars a year. How many {good} must be sold to break even, and what does the firm earn on sales of {sold}? "
                "How far could sales fall before there is a loss?")
    working = (f"Every piece contributes {price} - {variable} = {margin} dollars. Fixed costs are covered by {fixed} / {margin}, rounded up: "
               f"{units} pieces, or {units * price} dollars of revenue. At {sold} pieces the contribution is {sold * margin}, so the result is "
               f"{profit} dollars. " + (f"The margin of safety is {sold - units} pieces, {(sold - units) / sold:.1%} of sales." if profit > 0
               else f"The firm is {units - sold} pieces short of covering its costs."))
    return question, working, f"{units} pieces; {profit} dollars"


def depreciation(r):
    firm, cost, life, rest = r.choice(FIRMS), r.randint(20, 120) * 1000, r.choice((4, 5, 8, 10)), r.randint(1, 8) * 1000
    thing = r.choice(("a forklift", "a printing press", "a server room", "a bottling line"))
    rate, book, rows = 2 / life, float(cost), []
    for year in (1, 2, 3):
        charge = min(book * rate, book - rest)
        book -= charge
        rows.append(f"year {year}: charge {charge:.0f}, book value {book:.0f}")
    straight = (cost - rest) / life
    question = (f"{firm} buys {thing} for {cost} dollars, to be used for {life} years and then sold for about {rest}. Compare the charges of the "
                "first three years under straight-line and under double-declining-balance depreciation.")
    working = (f"Straight line spreads {cost} - {rest} over {life} years: {straight:.0f} a year. Double declining balance takes "
               f"{rate:.0%} of the opening book value, ignoring salvage until it binds: {'; '.join(rows)}. After three years straight line would show "
               f"{cost - 3 * straight:.0f}, so the faster method has charged {cost - 3 * straight - book:.0f} dollars more so far; over the whole "
               "life both charge the same sum.")
    return question, working, f"{straight:.0f}; {book:.0f}"


def inventory(r):
    firm = r.choice(FIRMS)
    lots = [(r.randint(20, 90) * 10, r.randint(10, 40)) for _ in range(3)]
    have = sum(q for q, _ in lots)
    sold = r.randint(have // 3, have - 60)

    def cost(order):
        left, total = sold, 0
        for q, p in order:
            take = min(q, left)
            total, left = total + take * p, left - take
        return total

    fifo, lifo = cost(lots), cost(lots[::-1])
    question = (f"{firm} starts the year without stock and buys three lots: " + ", then ".join(f"{q} units at {p} dollars" for q, p in lots)
                + f". It sells {sold} units. What is the cost of goods sold under FIFO and under LIFO, and what is left on the balance sheet?")
    total = sum(q * p for q, p in lots)
    working = (f"Purchases amount to {total} dollars for {have} units, and {have - sold} remain. FIFO charges the oldest lots first: {fifo}, leaving "
               f"{total - fifo}. LIFO charges the latest lots first: {lifo}, leaving {total - lifo}. "
               + (f"LIFO reports {lifo - fifo} less profit" if lifo >= fifo else f"LIFO reports {fifo - lifo} more profit")
               + f"; an average cost of {total / have:.2f} would lie between, at {sold * total / have:.0f}.")
    return question, working, f"{fifo}; {lifo}"


def put_call_parity(r):
    firm, spot, strike, rate, months, call = r.choice(FIRMS), r.randint(40, 120), r.randint(40, 120), r.randint(1, 6), r.choice((3, 6, 12)), 0.0
    call = round(max(spot - strike, 0) + r.randint(30, 90) / 10, 2)
    pv = strike / (1 + rate * months / 1200)
    put = call + pv - spot
    quoted = round(put + r.choice((-1.5, 1.25, 2.0)), 2)
    question = (f"A share of {firm}, which pays no dividend, trades at {spot} dollars. A European call struck at {strike} with {months} months to run "
                f"costs {call:.2f}; the put with the same terms is quoted at {quoted:.2f}. Money earns {rate}% a year, simple. "
                "Is the put dear or cheap, and how would you trade?")
    working = (f"The strike is worth {strike} / {1 + rate * months / 1200:.4f} = {pv:.2f} today. Parity asks that call plus cash equals put plus share: "
               f"put = {call:.2f} + {pv:.2f} - {spot} = {put:.2f}. At {quoted:.2f} it is {'dear' if quoted > put else 'cheap'} by {abs(quoted - put):.2f}. "
               + ("Sell the put, short the share, buy the call and lend the present value." if quoted > put else
                  "Buy the put and the share, write the call and borrow the present value.") + " The gain is earned today, without risk at expiry.")
    return question, working, f"{put:.2f}"


def duration(r):
    face, coupon, years, rate, shift = 100, r.randint(2, 8), r.randint(3, 5), r.randint(2, 8), r.choice((25, 50, 75, 100))
    fund = r.choice(("A pension fund", "An insurer", "A university endowment", "A savings bank"))
    values = [(face * (t == years) + coupon) / (1 + rate / 100) ** t for t in range(1, years + 1)]
    price = sum(values)
    macaulay = sum(t * v for t, v in enumerate(values, 1)) / price
    modified = macaulay / (1 + rate / 100)
    question = (f"{fund} holds {years}-year bonds with annual coupons of {coupon}% at a yield of {rate}%. By about how much will their price "
                f"change if yields {r.choice(('rise', 'climb'))} by {shift} basis points? Use modified duration.")
    rows = ", ".join(f"{v:.3f}" for v in values)
    working = (f"Per 100 of face the discounted payments are {rows}, in total {price:.3f}. Weighting each year by its share gives a Macaulay duration "
               f"of {macaulay:.3f} years; divided by {1 + rate / 100:.2f} the modified duration is {modified:.3f}. A rise of {shift / 100:.2f} points "
               f"costs about {modified:.3f} x {shift / 100:.2f} = {modified * shift / 100:.2f}% of the price. Convexity makes the true loss slightly smaller.")
    return question, working, f"-{modified * shift / 100:.2f}%"


FINANCE: dict[str, Family] = {f.__name__: f for f in (
    bond_price, loan_payment, net_present_value, capital_asset_pricing, capital_cost, portfolio_risk, currency_forward, break_even, depreciation,
    inventory, put_call_parity, duration)}
