"use strict";
// Which heads light up: choose a model, a layer and a head; its tokens are marked in the passages.
(() => {
  const models = JSON.parse(document.getElementById("passages").textContent);
  const root = document.getElementById("viewer");
  if (!root || !models.length) return;
  // A token names the place of its heads among the model's sets; from here on it has them.
  for (const { sets, texts } of models)
    for (const text of texts) text.on = text.on.map((layer) => layer.map((place) => sets[place]));

  const ALL = -1;
  const state = { model: 0, layer: 0, head: ALL };
  const percent = (share) => `${Math.round(100 * share)}%`;

  function make(tag, properties = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name in element) element[name] = value;
      else element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  }

  const visible = (token) => token.replaceAll("\n", "↵").replaceAll("\t", "→");
  const model = () => models[state.model];
  const routed = (layer) =>
    Array.from({ length: model().heads[layer] }, (_, i) => i).filter((i) => !model().shared[layer].includes(i));

  function share(text, layer, head) {
    const tokens = text.on[layer];
    return tokens.filter((on) => on.includes(head)).length / Math.max(tokens.length, 1);
  }

  // The page opens on the head on which the passages agree least.
  function chooseTelling() {
    let largest = -1;
    model().heads.forEach((_, layer) => {
      for (const head of routed(layer)) {
        const shares = model().texts.map((text) => share(text, layer, head));
        const range = Math.max(...shares) - Math.min(...shares);
        if (range > largest) [largest, state.layer, state.head] = [range, layer, head];
      }
    });
  }

  const row = (name, ...children) =>
    make("div", { className: "row", role: "group", "aria-label": name },
      make("span", { className: "name" }, name), make("div", { className: "choices" }, ...children));

  function choice(content, pressed, change, properties = {}) {
    return make("button", {
      type: "button",
      "aria-pressed": String(pressed),
      onclick: () => { Object.assign(state, change); redraw(); },
      ...properties,
    }, ...content);
  }

  function headButton(head) {
    const shares = model().texts.map((text) => share(text, state.layer, head));
    const bars = shares.map((value) => {
      const bar = make("i");
      bar.style.width = percent(value);
      return make("span", { className: "bar" }, bar);
    });
    const spoken = model().texts.map((text, i) => `${text.domain} ${percent(shares[i])}`);
    const label = `Head ${head}: on for ${spoken.join(", ")} of the tokens`;
    return choice([`Head ${head}`, ...bars], state.head === head, { head },
      { className: "head", title: label, "aria-label": label });
  }

  function controls() {
    const select = make("select", {
      "aria-label": "Model",
      onchange: () => { state.model = select.selectedIndex; chooseTelling(); redraw(); },
    }, ...models.map((m, i) => make("option", { selected: i === state.model }, m.label)));
    const layers = model().heads.map((_, layer) =>
      choice([String(layer)], layer === state.layer,
        { layer, head: routed(layer).includes(state.head) ? state.head : ALL },
        { "aria-label": `Layer ${layer}` }));
    const shared = model().shared[state.layer];
    const always = shared.length
      ? `${shared.length > 1 ? "Heads" : "Head"} ${shared.join(", ")} ${shared.length > 1 ? "are" : "is"} shared: on for every token.`
      : "No head is shared.";
    return make("div", { className: "controls" },
      row("Model", select),
      row("Layer", ...layers),
      row("Heads", ...routed(state.layer).map(headButton),
        choice(["All routed heads"], state.head === ALL, { head: ALL })),
      make("div", { className: "row" }, make("span", { className: "name" }),
        make("div", { className: "choices" },
          make("span", { className: "legend" },
            ...model().texts.map((text) => make("span", {}, text.domain))),
          make("span", { className: "always" }, always))));
  }

  // "x\n  y" becomes two pieces with the line break between them; a picture stands for tab and break.
  function pieces(token) {
    const lines = token.split("\n");
    return lines.flatMap((line, i) => {
      const piece = make("span");
      line.split(/(\t)/).forEach((part) =>
        piece.append(part === "\t" ? make("i", {}, "→\t") : part));
      if (i === lines.length - 1) return line || lines.length === 1 ? [piece] : [];
      piece.append(make("i", {}, "↵"));
      return [piece, "\n"];
    });
  }

  function tokenSpan(text, index, move) {
    const on = text.on[state.layer][index];
    const span = make("span", { className: "token", role: "option", tabIndex: index ? -1 : 0 },
      ...pieces(text.tokens[index]));
    if (state.head === ALL) {
      const dots = routed(state.layer).map((h) => make("b", { className: on.includes(h) ? "on" : "" }));
      span.firstElementChild.append(make("span", { className: "dots", "aria-hidden": "true" }, ...dots));
    }
    span.setAttribute("aria-selected", String(state.head !== ALL && on.includes(state.head)));
    span.setAttribute("aria-label", `${visible(text.tokens[index])}, heads ${on.join(" ")}`);
    span.onfocus = span.onmouseenter = () => detail(text, index);
    span.onkeydown = (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (step) { event.preventDefault(); move(index, index + step); }
    };
    return span;
  }

  function passage(text) {
    let spans = [];
    const move = (from, to) => {
      if (!spans[to]) return;
      spans[from].tabIndex = -1;
      spans[to].tabIndex = 0;
      spans[to].focus();
    };
    spans = text.tokens.map((_, index) => tokenSpan(text, index, move));
    const count = state.head === ALL
      ? `a dot for each of heads ${routed(state.layer).join(", ")}`
      : `head ${state.head} is on for ${percent(share(text, state.layer, state.head))} of ${spans.length} tokens`;
    return make("div", {},
      make("h3", {}, text.domain, make("output", {}, count)),
      make("div", {
        className: state.head === ALL ? "text all" : "text",
        role: "listbox", "aria-multiselectable": "true",
        "aria-label": `Tokens of the ${text.domain} passage, ${count}`,
      }, ...spans));
  }

  const panel = make("div", { className: "detail", tabIndex: 0, role: "region", "aria-label": "Heads of the token" });

  function detail(text, index) {
    const widest = Math.max(...model().heads);
    const heads = Array.from({ length: widest }, (_, head) => head);
    const rows = text.on.map((tokens, layer) =>
      make("tr", { className: layer === state.layer ? "chosen" : "" },
        make("th", { scope: "row" }, `Layer ${layer}`),
        ...heads.slice(0, model().heads[layer]).map((head) => {
          const on = tokens[index].includes(head);
          const kind = model().shared[layer].includes(head) ? "shared" : "";
          return make("td", { className: `${on ? "on" : ""} ${kind}`, "aria-label": on ? "on" : "off" });
        })));
    panel.replaceChildren(
      make("p", {}, make("code", {}, visible(text.tokens[index])), ` token ${index} of ${text.domain}; squares are shared heads, circles routed ones, filled is on`),
      make("table", {},
        make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "Head"),
          ...heads.map((head) => make("th", { scope: "col" }, String(head))))),
        make("tbody", {}, ...rows)));
  }

  function redraw() {
    const focused = document.activeElement?.getAttribute?.("aria-label") ?? document.activeElement?.textContent;
    root.replaceChildren(controls(),
      make("div", { className: "passages" }, ...model().texts.map(passage)), panel);
    detail(model().texts[0], 0);
    // The buttons are new; the keyboard stays where it was.
    [...root.querySelectorAll("button, select")]
      .find((b) => (b.getAttribute("aria-label") ?? b.textContent) === focused)?.focus();
  }

  chooseTelling();
  redraw();
})();
