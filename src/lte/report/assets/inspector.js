'use strict';
/* The inspector: the text of one run or two with a panel beside it, pictures of the whole below, and on a served page a
   form for another text. */

(() => {
  const { element, count, percent } = Shell;

  const relative = (run, kind) => percent(sumOf(run.cost[kind]) / sumOf(run.cost[`dense_${kind}`]));

  function sentence(run, index, state) {
    const measured = run.measured === null ? '' : `, ${percent(run.measured)} measured when it was saved`;
    const pass = run.reads_at_once
      ? 'an encoder reads all tokens in one go, so bytes hold for texts of one token; ' : '';
    return element('p', { class: 'told' }, element('b', {}, `${nameOf(state, index)}${run.text} on ${run.model}`),
      ` skips ${percent(run.sparsity)} of the FFN neurons per token (target ${percent(run.target, 0)}${measured}): ` +
      `${relative(run, 'flops')} of the dense model’s FLOPs, ${relative(run, 'bytes')} of its bytes. `,
      element('span', { class: 'quiet' }, `${count(run.length)} tokens; ${run.layers} layers, each with ` +
        `${run.experts} experts of ${run.expert_size} neurons; ${pass}${percent(run.union)} of the experts are used ` +
        'by some token.'));
  }

  /* Which of two runs something is of. */
  const headingOf = (state, run) => (state.routings.length > 1 ? [element('h3', {},
    `${nameOf(state, run)}${state.routings[run].text}, ${state.routings[run].model}`)] : []);

  /* The text or both texts, what colours them, and the what-if slider. */
  function textSection(state) {
    const texts = state.routings.map((_, index) => new TokenText(index, state));
    const names = Object.entries(COLOURINGS).filter(([, { offered }]) => offered?.(state) ?? true);
    const select = element('select', {}, ...names.map(([value]) => element('option', { value })));
    const legend = element('p', { class: 'legend' });
    const slider = element('input', { type: 'range', min: '0',
      max: String(state.routing.what_if.thresholds.length - 1), step: '1' });
    const told = element('output', {});
    const reset = Shell.button('The model’s own', () => state.set({ step: null }));
    function paint() {
      const kind = colouring(state);
      select.value = names.some(([value]) => value === state.colour) ? state.colour : 'share';
      names.forEach(([, { name }], index) => { select.options[index].textContent = name(state); });
      const { centre } = kind.scales[state.run];
      const [least, most] = kind.ends;
      const middle = kind.centre && !centre ? '' : `, ${kind.words(centre)}`;
      const ramp = element('span', { class: 'ramp' });
      legend.replaceChildren(`${least < centre ? 'less, ' : ''}${kind.words(least)}`, ramp,
        `${kind.words(most)}${most > centre && kind.mean !== 'off' ? ', more' : ''}`,
        element('span', {}, `no colour: ${kind.mean ?? 'the mean'}${middle}`));
      texts.forEach((text) => text.paint(kind));
    }
    function showStep() {
      slider.value = String(state.step ?? state.routing.what_if.own);
      reset.disabled = state.step === null;
      told.textContent = state.routings.map((run, index) => {
        const { thresholds, own } = run.what_if;
        const step = Math.min(state.step ?? own, thresholds.length - 1);
        const share = meanOf(run.shares(step));
        const whose = step === own ? ', the model’s own' : '';
        return `${nameOf(state, index)}threshold ${thresholds[step].toFixed(3)}${whose}: ${percent(share)} of the ` +
          `neurons, ${percent(run.work('flops', share))} of the FLOPs, ` +
          `${percent(run.work('bytes', share))} of the bytes`;
      }).join('; ');
      slider.setAttribute('aria-valuetext', told.textContent);
    }
    select.addEventListener('change', () => state.set({ colour: select.value }));
    slider.addEventListener('input', () => {
      const step = Number(slider.value);
      state.set({ step: step === state.routing.what_if.own ? null : step });
    });
    state.onChange(['colour', 'step'], paint);
    state.onChange(['layer', 'expert'], (changed) => {
      if (changed.includes(state.colour) || state.colour === 'expert') paint();
    });
    state.onChange(['step', 'run'], showStep);
    const columns = texts.map(({ text }, index) => element('div', {}, ...headingOf(state, index), text));
    const explained = element('p', { class: 'caption' }, 'Every piece is a token, the unit in which the model reads. ' +
      'Its feed-forward neurons are grouped into experts, and a router switches on for each token those it needs. ' +
      'Choose a token with a click or the arrow keys.');
    const box = element('section', { class: 'panel text', 'aria-label': 'The text, token by token' },
      element('div', { class: 'controls' }, element('label', {}, 'Colour by ', select), legend),
      element('div', { class: `columns ${texts.length > 1 ? 'two' : ''}` }, ...columns), explained,
      element('div', { class: 'controls' }, element('label', { class: 'wide' }, 'What if the threshold were ', slider),
        reset),
      element('p', { class: 'quiet' }, told, '. What another threshold costs is computed from the scores of this ' +
        'pass; what it would do to the quality is not known until it is measured.'));
    return { box, show: () => { paint(); showStep(); texts.forEach((text) => text.select()); } };
  }

  function pictureSection(title, ...boxes) {
    return element('section', { class: 'panel' }, element('h2', { class: 'first' }, title), ...boxes);
  }

  function show({ runs, references, pairs }) {
    const page = document.getElementById('page');
    if (!runs.length) return;
    const known = references.map((reference, index) => new Reference(reference,
      runs.find((run) => run.reference === index).experts));
    const routings = runs.map((run) => new Routing(run, known[run.reference]));
    const state = new State(routings, pairs);
    const text = textSection(state);
    const panel = new TokenPanel(state);
    const atlas = new Atlas(state);
    const each = (picture) => routings.flatMap((_, run) => [...headingOf(state, run), picture(state, run).box]);
    const predicted = routings.every(({ next }) => next) && routings.some(({ length }) => length > 2);
    const sections = [
      state.partners[0].some((partner) => partner >= 0)
        && pictureSection('The difference', differenceBars(state).box),
      pictureSection('The whole text, layer by layer', ...each(layerMap)),
      predicted && pictureSection('Does it spend more where it is less sure?',
        element('div', { class: 'columns two' }, whyScatter(state, 'surprise', 'surprise of the token, bits',
          'to the right the surprising ones').box, whyScatter(state, 'entropy', 'entropy of what comes next, bits',
          'to the right those after which the model finds much open').box)),
      atlas.box,
      pictureSection('What other thresholds would cost', ...each(whatIfCurve)),
    ].filter(Boolean);
    const notes = routings.flatMap((routing, index) =>
      routing.notes.map((note) => element('p', { class: 'note' }, `${nameOf(state, index)}${note}`)));
    page.replaceChildren(...routings.map((run, index) => sentence(run, index, state)), ...notes,
      element('div', { class: 'inspector' }, text.box, panel.box, element('div', { class: 'rest' }, ...sections)));
    Shell.clearPictures();
    [text, panel, atlas].forEach((part) => part.show());
  }

  /* The form of a served page. What is typed outlives a reload; Ctrl+Enter sends it. */
  function serve(form) {
    const names = ['text', 'compare', 'state', 'problem', 'inspect', 'generate', 'stop', 'live'];
    const [text, compare, status, problem, inspect, generate, stop, live] = names.map((name) =>
      document.getElementById(`ask-${name}`));
    for (const field of [text, compare]) {
      field.value = sessionStorage.getItem(field.id) ?? '';
      field.addEventListener('input', () => sessionStorage.setItem(field.id, field.value));
    }
    let control = null;

    async function post(path, read) {
      control = new AbortController();
      [problem.hidden, live.hidden] = [true, true];
      [inspect.disabled, generate.disabled, stop.hidden] = [true, true, path !== 'generate'];
      status.textContent = 'The model is reading…';
      try {
        const answer = await fetch(path, { method: 'POST', headers: { 'Content-Type': 'application/json' },
          signal: control.signal, body: JSON.stringify({ text: text.value, compare: compare.value }) });
        if (!answer.ok) throw new Error((await answer.json()).error);
        show(await read(answer));
        sessionStorage.setItem('ask-shown', path);
        status.textContent = 'Done; the text is below.';
      } catch (error) {
        problem.textContent = error.message;
        problem.hidden = error.name === 'AbortError';
        status.textContent = error.name === 'AbortError' ? 'Stopped.' : '';
      } finally {
        [inspect.disabled, generate.disabled, stop.hidden] = [false, false, true];
      }
    }

    /* Lines of JSON, a token each, shown as they come; the last is the page of all. */
    async function follow(answer) {
      live.replaceChildren(visible(text.value));
      live.hidden = false;
      status.textContent = 'The model is writing; each token is filled to the share of the neurons that it used.';
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let kept = '';
      for (let part = await reader.read(); !part.done; part = await reader.read()) {
        const lines = (kept + part.value).split('\n');
        kept = lines.pop();
        for (const found of lines.map((line) => JSON.parse(line))) {
          if (found.error) throw new Error(found.error);
          if (found.runs) {
            live.hidden = true;
            return found;
          }
          const token = element('span', { class: 'live', title: percent(found.share) }, visible(found.entry));
          token.style.setProperty('--share', `${100 * found.share}%`);
          live.append(token);
        }
      }
      throw new Error('The server stopped in the middle of the text.');
    }

    const ask = () => post('inspect', (answer) => answer.json());
    form.hidden = false;
    form.addEventListener('submit', (event) => {
      event.preventDefault();
      ask();
    });
    form.addEventListener('keydown', (event) => {
      if (event.key === 'Enter' && (event.ctrlKey || event.metaKey) && !inspect.disabled) ask();
    });
    generate.addEventListener('click', () => post('generate', follow));
    stop.addEventListener('click', () => control.abort());
    for (const example of form.querySelectorAll('[data-example]')) {
      example.addEventListener('click', () => {
        text.value = example.dataset.example;
        text.dispatchEvent(new Event('input'));
        if (!inspect.disabled) ask();
      });
    }
    if (text.value && sessionStorage.getItem('ask-shown') && !Shell.data.runs.length) ask();
  }

  if (Shell.data.served) serve(document.getElementById('ask'));
  show(Shell.data);
})();
