'use strict';
/* The routing of one text, as it lies packed in the page's data. */

function bytesOf(text) {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}

const BIT_COUNTS = Uint8Array.from({ length: 256 }, (_, byte) => [...byte.toString(2)].filter((bit) => bit === '1').length);
const CONTROLS = { '\n': '⏎', '\r': '␍', '\t': '⇥' };

/* Text on one line, with signs for what has none of its own; a mark that would join what stands before gets a carrier. */
function visible(text) {
  const shown = text.replace(/[\u0000-\u001f\u007f]/g,
    (control) => CONTROLS[control] ?? String.fromCharCode(0x2400 + Math.min(control.charCodeAt(0), 0x21)));
  return /^\p{M}/u.test(shown) ? `◌${shown}` : shown;
}

class TokenList {
  constructor({ ids, tokens, entries, total_tokens: total }) {
    Object.assign(this, { ids, texts: tokens, entries, total });
    this.occurrences = new Map();
    for (const id of ids) this.occurrences.set(id, (this.occurrences.get(id) ?? 0) + 1);
  }

  get length() {
    return this.ids.length;
  }

  /* The token's stretch of the text; of special tokens and parts of characters the vocabulary entry in brackets. */
  label(index) {
    return this.texts[index] ? visible(this.texts[index]) : `‹${visible(this.entries[index])}›`;
  }

  /* The token between those around it: what stands before, the token, what comes after. */
  context(index, reach = 6) {
    const join = (from, to) => this.texts.slice(Math.max(from, 0), to).map(visible).join('');
    return [join(index - reach, index), this.label(index), join(index + 1, index + 1 + reach)];
  }
}

class Routing {
  constructor(run) {
    Object.assign(this, run);
    this.list = new TokenList(run);
    this.bits = bytesOf(run.active);
    this.stride = Math.ceil(run.experts / 8);
    this.counts = new Uint16Array(run.layers * this.length);
    this.bits.forEach((byte, index) => {
      this.counts[Math.floor(index / this.stride)] += BIT_COUNTS[byte];
    });
    this.shares = Float64Array.from({ length: this.length }, (_, token) => this.total(token) / (run.layers * run.experts));
    this.known = new Reference(run, this.list);
  }

  get length() {
    return this.list.length;
  }

  isOn(layer, token, expert) {
    return (this.bits[(layer * this.length + token) * this.stride + (expert >> 3)] >> (7 - (expert & 7))) & 1;
  }

  /* How many experts of a layer a token switches on. */
  count(layer, token) {
    return this.counts[layer * this.length + token];
  }

  /* How many experts of all layers a token switches on. */
  total(token) {
    let sum = 0;
    for (let layer = 0; layer < this.layers; layer++) sum += this.count(layer, token);
    return sum;
  }

  /* Share of a layer's experts that are on, mean over tokens. */
  layerShare(layer) {
    let sum = 0;
    for (let token = 0; token < this.length; token++) sum += this.count(layer, token);
    return sum / (this.length * this.experts);
  }

  activeExperts(layer, token) {
    return Array.from({ length: this.experts }, (_, expert) => expert).filter((expert) => this.isOn(layer, token, expert));
  }
}

/* What the reference text tells about each expert. */
class Reference {
  constructor(run, ownTokens) {
    const { reference } = run;
    Object.assign(this, { text: reference.text, notes: reference.notes, experts: run.experts, kept: reference.strongest });
    this.list = reference.tokens ? new TokenList(reference.tokens) : ownTokens;
    this.isOwn = !reference.tokens;
    this.shares = new Float32Array(bytesOf(reference.use).buffer);
    this.positions = new Int32Array(bytesOf(reference.positions).buffer);
    this.scores = new Float32Array(bytesOf(reference.scores).buffer);
    this.switchedOn = new Int32Array(bytesOf(reference.switched_on).buffer);
  }

  use(layer, expert) {
    return this.shares[layer * this.experts + expert];
  }

  strongest(layer, expert) {
    const start = (layer * this.experts + expert) * this.kept;
    const found = [];
    for (let index = start; index < start + this.kept && this.positions[index] >= 0; index++) {
      const position = this.positions[index];
      const occurrences = this.list.occurrences.get(this.list.ids[position]);
      found.push({ position, score: this.scores[index], switchedOn: this.switchedOn[index], occurrences });
    }
    return found;
  }
}

/* What a reader has chosen in one run: a token, a layer, an expert. */
class Choice extends EventTarget {
  /* At first it is the token that used most of the network, and the first expert that it switched on. */
  constructor(routing) {
    super();
    const token = routing.shares.indexOf(routing.shares.reduce((most, share) => Math.max(most, share), 0));
    const layers = Array.from({ length: routing.layers }, (_, index) => index);
    const layer = Math.max(layers.findIndex((index) => routing.count(index, token) > 0), 0);
    Object.assign(this, { token, layer, expert: routing.activeExperts(layer, token)[0] ?? 0 });
  }

  set(changes) {
    const changed = Object.keys(changes).filter((name) => this[name] !== changes[name]);
    if (!changed.length) return;
    Object.assign(this, changes);
    this.dispatchEvent(new CustomEvent('change', { detail: changed }));
  }

  onChange(names, listener) {
    this.addEventListener('change', (event) => {
      if (event.detail.some((name) => names.includes(name))) listener();
    });
  }
}
