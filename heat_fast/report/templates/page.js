// The page's behaviour. Everything shown is put into text nodes, never parsed as HTML.
"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const N = data.tokens.length;
  const T = data.targets.length;
  const COMPONENTS = Object.keys(data.rows).filter((name) => name !== "stderr"); // those measured
  const MASKED = new Set(["information", "drop"]);
  const special = new Set(data.special);
  const skipped = new Set(data.skipped);

  const state = {
    component: "score",
    aggregate: data.aggregate,
    row: null, // one target's own row, or all of them aggregated
    threshold: 0,
    hovered: null, // cells: see below
    focused: null,
    anchor: null, // the span runs from anchor to head
    head: null,
  };

  // --- numbers ---

  const decode = (text) =>
    new Float32Array(Uint8Array.from(atob(text), (character) => character.charCodeAt(0)).buffer);
  const rows = Object.fromEntries(Object.entries(data.rows).map(([name, text]) => [name, decode(text)]));
  const logProbs = decode(data.log_probs);
  const cache = new Map();

  const remembered = (kind, name, make) => {
    const key = `${kind} ${name} ${state.row ?? state.aggregate}`;
    if (!cache.has(key)) cache.set(key, make());
    return cache.get(key);
  };

  // One value per prompt token: the chosen target's row, or the aggregate of all.
  const values = (name) => remembered("values", name, () => {
    const all = rows[name];
    if (state.row !== null) return all.subarray(state.row * N, (state.row + 1) * N);
    const found = new Float64Array(N).fill(state.aggregate === "max" ? -Infinity : 0);
    for (let t = 0; t < T; t++) {
      for (let i = 0; i < N; i++) {
        const value = all[t * N + i];
        found[i] = state.aggregate === "max" ? Math.max(found[i], value) : found[i] + value;
      }
    }
    return state.aggregate === "mean" ? found.map((value) => value / T) : found;
  });

  // Rank and share follow the magnitude, as in Attribution.ranking and Attribution.shares.
  const strength = (name) => remembered("strength", name, () => {
    const sizes = Float64Array.from(values(name), Math.abs);
    const order = Array.from(sizes.keys()).sort((a, b) => sizes[b] - sizes[a] || a - b);
    const rank = new Int32Array(N);
    order.forEach((index, place) => { rank[index] = place + 1; });
    const total = sizes.reduce((sum, size) => sum + size, 0);
    return { sizes, order, rank, total, highest: sizes[order[0]] };
  });

  const share = (index) => {
    const { sizes, total } = strength(state.component);
    return total > 0 ? sizes[index] / total : 0;
  };

  const format = (value) => {
    const size = Math.abs(value);
    if (size === 0) return "0";
    if (size < 1e-4 || size >= 1e5) return value.toExponential(2);
    return size < 999.5 ? value.toPrecision(3) : Math.round(value).toLocaleString("en");
  };
  const percent = (part) => `${(100 * part).toFixed(part > 0 && part < 0.0995 ? 2 : 1)}%`;

  const unmeasured = (name, index) => MASKED.has(name) && skipped.has(index);
  const shownValue = (name, index) => {
    if (unmeasured(name, index)) return "not measured";
    const value = values(name)[index];
    return (name === "drop" && value > 0 ? "+" : "") + format(value);
  };

  // Of several targets the probes are shared, so their errors may add up: a bound, no estimate.
  const shownError = (index) => {
    if (!rows.stderr || (T > 1 && state.row === null && state.aggregate === "max")) return "";
    const error = values("stderr")[index];
    const bound = T > 1 && state.row === null ? "at most " : "";
    return error > 0 ? ` ± ${bound}${format(error)}` : "";
  };

  // --- text ---

  const INVISIBLE = /([\n\t\u00a0\u00ad\u200b\u2060\ufeff]| {2,}|^ +$)/;
  const SIGNS = { "\n": "↵", "\t": "⇥", "\u00a0": "⍽" };
  const sign = (character) =>
    SIGNS[character] ?? `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;

  // A token on one line.
  const visible = (text) =>
    text
      .replace(/[\n\t\u00a0\u00ad\u200b\u2060\ufeff]/g, sign)
      .replace(/^ +| +$/g, (spaces) => "·".repeat(spaces.length)) || "∅";

  const mark = (text) => {
    const element = document.createElement("i");
    element.className = "mark";
    element.dataset.mark = text;
    element.setAttribute("aria-hidden", "true");
    return element;
  };

  // The text as it reads, with signs where white space would be overlooked.
  const fill = (element, text) => {
    if (text === "") element.append(mark("∅"));
    for (const piece of text.split(INVISIBLE)) {
      if (piece === "") continue;
      if (!INVISIBLE.test(piece)) { element.append(piece); continue; }
      for (const character of piece) {
        if (character === " ") { element.append(mark("·")); continue; }
        element.append(mark(sign(character)));
        if (character === "\n" || character === "\t") element.append(character);
      }
    }
  };

  // A single space before a word stays outside of its colour.
  const splitSpace = (text) => (/^ \S/.test(text) ? [" ", text.slice(1)] : ["", text]);

  // --- the prompt: one cell for each stretch that holds tokens ---

  const prompt = byId("prompt");
  const cells = [];
  const cellOf = new Int32Array(N);

  const buildPrompt = () => {
    const fragment = document.createDocumentFragment();
    for (const piece of data.pieces) {
      const [text, ...tokens] = Array.isArray(piece) ? piece : [data.tokens[piece], piece];
      const before = cells[cells.length - 1]?.element;
      if (tokens.length === 0) {
        if (/^\s/.test(text)) before?.classList.add("end");
        fragment.append(text);
        continue;
      }
      const isSpecial = tokens.some((index) => special.has(index));
      const [space, body] = isSpecial ? ["", text] : splitSpace(text);
      const element = document.createElement("span");
      element.className = isSpecial ? "t special" : "t";
      if (space) {
        element.classList.add("start");
        before?.classList.add("end");
      }
      element.tabIndex = -1;
      element.setAttribute("role", "option");
      element.setAttribute("aria-selected", "false");
      element.dataset.cell = cells.length;
      fill(element, body);
      fragment.append(space, element);
      tokens.forEach((index) => { cellOf[index] = cells.length; });
      cells.push({ element, tokens, step: "", selected: false });
    }
    prompt.append(fragment);
  };

  // Of the pieces of one character, the strongest speaks for it.
  const strongest = (cell) => {
    const { sizes } = strength(state.component);
    return cell.tokens.reduce((best, index) => (sizes[index] > sizes[best] ? index : best));
  };

  const stepOf = (value, highest) => {
    const step = highest > 0 ? Math.round(data.steps * Math.sqrt(Math.abs(value) / highest)) : 0;
    return step === 0 ? "" : (value < 0 ? "c" : "h") + step;
  };

  const paint = () => {
    const now = values(state.component);
    const { highest } = strength(state.component);
    const least = limit();
    for (const cell of cells) {
      const index = strongest(cell);
      const step = share(index) < least ? "" : stepOf(now[index], highest);
      if (step !== cell.step) {
        if (cell.step) cell.element.classList.remove(cell.step);
        if (step) cell.element.classList.add(step);
        cell.step = step;
      }
      if (skipped.size) {
        cell.element.classList.toggle("unmeasured", unmeasured(state.component, index));
      }
    }
  };

  const paintLegend = () => {
    const { highest } = strength(state.component);
    const negative = values(state.component).some((value) => value < 0);
    document.querySelector(".steps.cool").hidden = !negative;
    byId("legend-low").textContent = negative ? format(-highest) : "0";
    byId("legend-high").textContent = (negative ? "+" : "") + format(highest);
  };

  // The slider's squares leave room where most tokens are; its end leaves the strongest alone.
  const limit = () => {
    const { order } = strength(state.component);
    return (state.threshold / 100) ** 2 * share(order[0]);
  };

  const showThreshold = () => {
    const least = limit();
    let count = 0;
    let kept = 0;
    for (let i = 0; i < N; i++) {
      if (share(i) >= least) { count += 1; kept += share(i); }
    }
    const text = state.threshold === 0
      ? "0%"
      : `${percent(least)}: ${count} ${count === 1 ? "token holds" : "tokens hold"} ${percent(kept)}`;
    byId("threshold-value").textContent = text;
    byId("threshold").setAttribute("aria-valuetext", text);
  };

  // --- one token ---

  const current = () => state.hovered ?? state.focused ?? cellOf[strength(state.component).order[0]];

  let marked = null;
  const showToken = () => {
    const cell = cells[current()];
    if (marked !== cell.element) {
      marked?.classList.remove("over");
      cell.element.classList.add("over");
      marked = cell.element;
    }
    const index = strongest(cell);
    const { rank } = strength(state.component);
    byId("token-card").hidden = false;
    byId("token-text").textContent = visible(data.tokens[index]);
    byId("token-place").textContent =
      `position ${index} · rank ${rank[index]} of ${N} · ${percent(share(index))} of ${state.component}`;
    for (const name of COMPONENTS) {
      const { sizes, highest } = strength(name);
      const value = byId(`value-${name}`);
      value.textContent = shownValue(name, index) + (name === "curvature" ? shownError(index) : "");
      value.parentElement.classList.toggle("active", name === state.component);
      const meter = byId(`meter-${name}`);
      meter.value = highest > 0 ? sizes[index] / highest : 0;
      meter.classList.toggle("negative", values(name)[index] < 0);
    }
    const notes = [];
    if (special.has(index)) notes.push("Special token.");
    if (cell.tokens.length > 1) {
      notes.push(`One of ${cell.tokens.length} tokens that spell this character: ${cell.tokens.join(", ")}.`);
    }
    byId("token-note").textContent = notes.join(" ");
    for (const row of byId("rows").rows) {
      row.classList.toggle("current", cellOf[row.dataset.token] === current());
    }
  };

  const describe = (cell) => {
    const index = strongest(cell);
    const { rank } = strength(state.component);
    return `${visible(data.tokens[index])}, position ${index}, ${state.component} ` +
      `${shownValue(state.component, index)}, rank ${rank[index]} of ${N}`;
  };

  const focusCell = (number) => {
    const { element } = cells[number];
    element.focus({ preventScroll: true });
    element.scrollIntoView({ block: "nearest" });
  };

  let reachable = null;
  const makeReachable = (number) => {
    if (reachable !== null) cells[reachable].element.tabIndex = -1;
    cells[number].element.tabIndex = 0;
    reachable = number;
  };

  // --- a span ---

  const spanBounds = () =>
    state.anchor === null ? null : [Math.min(state.anchor, state.head), Math.max(state.anchor, state.head)];

  const setSpan = (anchor, head) => {
    state.anchor = anchor;
    state.head = head;
    showSpan();
  };

  // As it reads: with the text between tokens, which lies between the cells.
  const spanText = ([first, last]) => {
    const range = document.createRange();
    range.setStartBefore(cells[first].element);
    range.setEndAfter(cells[last].element);
    return range.toString();
  };

  const showSpan = () => {
    const bounds = spanBounds();
    byId("span-card").hidden = bounds === null;
    byId("hint").hidden = bounds !== null;
    cells.forEach((cell, number) => {
      const selected = bounds !== null && number >= bounds[0] && number <= bounds[1];
      if (selected !== cell.selected) {
        cell.element.classList.toggle("selected", selected);
        cell.element.setAttribute("aria-selected", String(selected));
        cell.selected = selected;
      }
    });
    if (bounds === null) return;
    const inside = cells.slice(bounds[0], bounds[1] + 1).flatMap((cell) => cell.tokens);
    const sum = inside.reduce((total, index) => total + values(state.component)[index], 0);
    const part = inside.reduce((total, index) => total + share(index), 0);
    byId("span-place").textContent =
      `${inside.length} ${inside.length === 1 ? "token" : "tokens"}, ${inside[0]} to ${inside[inside.length - 1]}`;
    byId("span-text").textContent = spanText(bounds);
    byId("span-name").textContent = `Summed ${state.component}`;
    byId("span-sum").textContent = format(sum);
    byId("span-share").textContent = percent(part);
  };

  // --- the table ---

  const showRanking = () => {
    const body = byId("rows");
    const wanted = Math.min(N, Math.max(1, Math.floor(Number(byId("k").value)) || 1));
    const now = values(state.component);
    const { order, highest } = strength(state.component);
    body.replaceChildren(...order.slice(0, wanted).map((index, place) => {
      const row = document.createElement("tr");
      row.dataset.token = index;
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = visible(data.tokens[index]);
      button.className = stepOf(now[index], highest);
      const plain = (text, active = false) => {
        const cell = row.insertCell();
        cell.textContent = text;
        if (active) cell.className = "active";
      };
      plain(place + 1);
      plain(index);
      const token = row.insertCell();
      token.className = "text";
      token.append(button);
      plain(percent(share(index)));
      for (const name of COMPONENTS) {
        plain(unmeasured(name, index) ? "–" : shownValue(name, index), name === state.component);
      }
      return row;
    }));
    for (const head of document.querySelectorAll("th[data-name]")) {
      if (head.dataset.name === state.component) head.setAttribute("aria-sort", "descending");
      else head.removeAttribute("aria-sort");
    }
  };

  // --- the targets ---

  const targets = byId("targets");
  const targetButtons = [];

  const buildTargets = () => {
    if (T > 1) {
      const all = document.createElement("button");
      all.type = "button";
      all.className = "all quiet";
      all.textContent = "All";
      all.addEventListener("click", () => chooseTarget(null));
      targets.append(all);
    }
    data.targets.forEach((text, number) => {
      const [space, body] = splitSpace(text);
      const element = document.createElement("span");
      element.className = "target";
      fill(element, body);
      targets.append(number === 0 ? "" : space, element);
      if (T === 1) return;
      element.setAttribute("role", "button");
      element.setAttribute("aria-label", `Target token ${number + 1}, ${visible(text)}`);
      element.tabIndex = number === 0 ? 0 : -1;
      element.addEventListener("click", () => chooseTarget(state.row === number ? null : number));
      targetButtons.push(element);
    });
  };

  const chooseTarget = (row) => {
    state.row = row;
    refresh();
  };

  const showTargets = () => {
    const row = T === 1 ? 0 : state.row;
    targetButtons.forEach((button, number) => {
      button.setAttribute("aria-pressed", String(number === state.row));
    });
    targets.querySelector(".all")?.setAttribute("aria-pressed", String(state.row === null));
    const aggregates = byId("aggregates");
    if (aggregates) aggregates.disabled = state.row !== null;
    if (row !== null) {
      const value = logProbs[row];
      const name = T === 1 ? "Log-probability" : `Token ${row + 1} of ${T}, its own row: log-probability`;
      byId("target-facts").textContent =
        `${name} ${format(value)}, probability ${format(Math.exp(Math.min(value, 0)))}`;
      return;
    }
    const sum = logProbs.reduce((total, value) => total + value, 0);
    byId("target-facts").textContent =
      `Log-probability of all ${T} tokens ${format(sum)}. Choose a token to see its own row.`;
  };

  // --- what happens ---

  const refresh = () => {
    paint();
    paintLegend();
    showThreshold();
    showTargets();
    showRanking();
    showSpan();
    showToken();
  };

  const cellAt = (event) => {
    const element = event.target.closest?.(".t");
    return element ? Number(element.dataset.cell) : null;
  };

  // The cell above or below that is nearest along the line.
  const vertical = (from, direction) => {
    const box = (number) => cells[number].element.getClientRects()[0];
    const start = box(from);
    if (!start) return from;
    const middle = (rectangle) => rectangle.left + rectangle.width / 2;
    let best = null;
    let line = null;
    for (let number = from + direction; number >= 0 && number < cells.length; number += direction) {
      const rectangle = box(number);
      if (!rectangle || Math.abs(rectangle.top - start.top) < start.height * 0.6) continue;
      if (line !== null && Math.abs(rectangle.top - line) > start.height * 0.6) break;
      line ??= rectangle.top;
      const distance = Math.abs(middle(rectangle) - middle(start));
      if (best === null || distance < best.distance) best = { number, distance };
    }
    return best === null ? from : best.number;
  };

  const MOVES = {
    ArrowRight: (from) => from + 1,
    ArrowLeft: (from) => from - 1,
    ArrowDown: (from) => vertical(from, 1),
    ArrowUp: (from) => vertical(from, -1),
    Home: () => 0,
    End: () => cells.length - 1,
  };

  const onPromptKey = (event) => {
    const from = cellAt(event);
    if (event.key === "Escape") { setSpan(null, null); return; }
    if (from === null || !(event.key in MOVES) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    const to = Math.min(cells.length - 1, Math.max(0, MOVES[event.key](from)));
    if (event.shiftKey) setSpan(state.anchor ?? from, to);
    else if (state.anchor !== null) setSpan(null, null);
    state.hovered = null;
    focusCell(to);
  };

  const onTargetKey = (event) => {
    const from = targetButtons.indexOf(event.target);
    if (from < 0) return;
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      event.target.click();
      return;
    }
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const next = targetButtons[from + step];
    if (!next) return;
    event.preventDefault();
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  };

  const listen = () => {
    let drag = null;
    prompt.addEventListener("pointerdown", (event) => {
      const cell = cellAt(event);
      if (cell === null || event.button !== 0 || event.pointerType === "touch") return;
      if (event.shiftKey) {
        setSpan(state.anchor ?? current(), cell);
        return;
      }
      drag = cell;
      setSpan(null, null);
    });
    prompt.addEventListener("pointerover", (event) => {
      const cell = cellAt(event);
      if (cell === null) return;
      state.hovered = cell;
      if (drag !== null && (cell !== drag || state.anchor !== null)) setSpan(drag, cell);
      showToken();
    });
    prompt.addEventListener("pointerleave", () => {
      state.hovered = null;
      showToken();
    });
    window.addEventListener("pointerup", () => { drag = null; });
    window.addEventListener("pointercancel", () => { drag = null; });
    prompt.addEventListener("focusin", (event) => {
      const cell = cellAt(event);
      if (cell === null) return;
      state.focused = cell;
      makeReachable(cell);
      cells[cell].element.setAttribute("aria-label", describe(cells[cell]));
      showToken();
    });
    prompt.addEventListener("keydown", onPromptKey);
    targets.addEventListener("keydown", onTargetKey);
    byId("clear").addEventListener("click", () => setSpan(null, null));
    byId("components")?.addEventListener("change", (event) => {
      state.component = event.target.value;
      refresh();
    });
    byId("aggregates")?.addEventListener("change", (event) => {
      state.aggregate = event.target.value;
      refresh();
    });
    byId("threshold").addEventListener("input", (event) => {
      state.threshold = Number(event.target.value);
      paint();
      showThreshold();
    });
    byId("k").addEventListener("input", () => { showRanking(); showToken(); });
    byId("rows").addEventListener("click", (event) => {
      const row = event.target.closest("tr");
      state.hovered = null;
      focusCell(cellOf[row.dataset.token]);
    });
  };

  const themeButton = byId("theme");
  const systemDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme ?? (systemDark.matches ? "dark" : "light")) === "dark";
  const showTheme = () => {
    themeButton.textContent = isDark() ? "Light" : "Dark";
    themeButton.setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`);
  };
  themeButton.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    showTheme();
  });
  systemDark.addEventListener("change", showTheme);

  buildPrompt();
  buildTargets();
  makeReachable(0);
  listen();
  showTheme();
  refresh();
})();
