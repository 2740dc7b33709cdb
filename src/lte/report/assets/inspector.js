'use strict';
/* The inspector: one column for each run, an overview over both, and on a served page a form for another text. */

(() => {
  const { element, count, percent } = Shell;
  const MARKS = [['on', 'solid', 'circle'], ['second', 'dashed', 'diamond']];

  function titleOf(routing, index, several) {
    return several ? `${'AB'[index]}: ${routing.text}, ${routing.model}` : `${routing.text}, ${routing.model}`;
  }

  /* Lowest and highest values in all runs, so that a colour means the same in both columns. */
  function scaleOf(routings) {
    return { share: rangeOf(routings.flatMap((routing) => [...routing.shares])),
      count: rangeOf(routings.flatMap((routing) => [...routing.counts])) };
  }

  function rangeOf(values) {
    return values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
  }

  function column(routing, index, scale, several) {
    const choice = new Choice(routing);
    const views = [new TokenText(routing, choice, scale, `token-${index}`), new LayerMap(routing, choice, scale),
      new ExpertMap(routing, choice), new ExpertPanel(routing, choice), new Costs(routing)];
    const heading = element('h2', {}, titleOf(routing, index, several));
    const notes = routing.notes.map((note) => element('p', { class: 'note' }, note));
    const box = element('section', { class: 'run', 'aria-label': titleOf(routing, index, several) }, heading, ...notes,
      ...views.map((view) => view.box));
    return { box, choice, show: () => views.forEach((view) => view.show?.()) };
  }

  const points = (share) => `${(100 * share).toFixed(2)} points`;

  /* Name, value, its words, and the words of a difference. */
  const ROWS = [
    ['tokens', (routing) => routing.length, count, count],
    ['layers x experts of neurons', (routing) => `${routing.layers} x ${routing.experts} of ${routing.expert_size}`, String],
    ['FFN neurons used per token', (routing) => 1 - routing.sparsity, (share) => percent(share, 2), points],
    ['least, most of a token', (routing) => rangeOf([...routing.shares]),
      (shares) => shares.map((share) => percent(share)).join(', ')],
    ['experts that some token uses', (routing) => routing.union, (share) => percent(share, 2), points],
    ['FLOPs over dense', (routing) => sumOf(routing.cost.flops) / sumOf(routing.cost.dense_flops), (share) => percent(share, 2), points],
    ['bytes over dense', (routing) => sumOf(routing.cost.bytes) / sumOf(routing.cost.dense_bytes), (share) => percent(share, 2), points],
  ];

  function overview(routings) {
    const several = routings.length > 1;
    const names = several ? routings.map((_, index) => 'AB'[index]) : ['this text'];
    const rows = ROWS.map(([name, value, words, difference]) => {
      const values = routings.map(value);
      const change = several && difference ? values[1] - values[0] : null;
      const told = change === null ? '' : `${change < 0 ? '−' : '+'}${difference(Math.abs(change))}`;
      return [name, ...values.map(words), ...(several ? [told] : [])];
    });
    const layers = Array.from({ length: Math.max(...routings.map((routing) => routing.layers)) }, (_, layer) => layer);
    const picture = new Shell.Picture({
      label: 'Lines of the share of experts that are on, by layer',
      caption: 'Each point is a layer, from the first on the left to the last on the right, and its height the share of ' +
        'the experts of that layer that a token switches on, mean over the text.',
      height: () => 220,
      options: () => layerLines(routings, names, layers),
      rows: () => ['Share of experts on by layer', ['layer', ...names], layers.map((layer) => [layer,
        ...routings.map((routing) => (layer < routing.layers ? percent(routing.layerShare(layer)) : ''))])],
    });
    const heading = element('h2', { class: 'first' }, several ? 'A and B at a glance' : 'At a glance');
    const box = element('section', { class: 'panel overview', 'aria-label': 'Overview' }, heading,
      Shell.scrollBox('Key numbers', Shell.table(several ? 'Key numbers, and B less A' : 'Key numbers',
        ['', ...names, ...(several ? ['difference'] : [])], rows)), picture.box);
    return { box, picture };
  }

  function layerLines(routings, names, layers) {
    return {
      legend: { show: routings.length > 1, top: 0, textStyle: { color: Shell.colour('ink') } },
      grid: { left: LEFT, right: 16, top: 30, bottom: 44 },
      tooltip: Shell.tooltip(({ seriesName, dataIndex, value }) => `${seriesName}, layer ${dataIndex}: ${percent(value)}`),
      xAxis: Shell.axis({ type: 'category', data: layers.map(String), name: 'layer', nameLocation: 'middle', nameGap: 28 }),
      yAxis: Shell.axis({ type: 'value', min: 0, max: 1, axisLabel: { formatter: (value) => percent(value, 0) } }),
      series: routings.map((routing, index) => {
        const [shade, dash, symbol] = MARKS[index];
        return { type: 'line', name: names[index], symbol, symbolSize: 7, showAllSymbol: true, lineStyle: { type: dash, width: 2 },
          color: Shell.colour(shade), data: Array.from({ length: routing.layers }, (_, layer) => routing.layerShare(layer)) };
      }),
    };
  }

  function show({ runs }) {
    Shell.clearPictures();
    const routings = runs.map((run) => new Routing(run));
    const several = routings.length > 1;
    const top = document.getElementById('overview');
    const place = document.getElementById('runs');
    place.className = several ? 'columns two' : 'columns one';
    if (!routings.length) {
      top.replaceChildren();
      place.replaceChildren();
      return;
    }
    const scale = scaleOf(routings);
    const columns = routings.map((routing, index) => column(routing, index, scale, several));
    const summary = overview(routings);
    top.replaceChildren(summary.box);
    place.replaceChildren(...columns.map(({ box }) => box));
    columns.forEach((each) => each.show());
    if (several) link(routings, columns.map(({ choice }) => choice));
  }

  /* Where both runs read the same tokens, a token that is chosen in one is chosen in the other. */
  function link(routings, [first, second]) {
    const [one, other] = routings.map((routing) => routing.ids);
    if (one.length !== other.length || one.some((id, index) => id !== other[index])) return;
    first.onChange(['token'], () => second.set({ token: first.token }));
    second.onChange(['token'], () => first.set({ token: second.token }));
  }

  async function ask(event) {
    event.preventDefault();
    const [text, compare, state, problem] = ['text', 'compare', 'state', 'problem'].map((name) => document.getElementById(`ask-${name}`));
    const button = event.target.querySelector('button');
    problem.hidden = true;
    button.disabled = true;
    state.textContent = 'The model is reading…';
    try {
      const answer = await fetch('inspect', { method: 'POST', headers: { 'Content-Type': 'application/json' },
        body: JSON.stringify({ text: text.value, compare: compare.value }) });
      const found = await answer.json();
      if (!answer.ok) throw new Error(found.error);
      show(found);
      state.textContent = 'Done; the pictures are below.';
    } catch (error) {
      problem.textContent = error.message;
      problem.hidden = false;
      state.textContent = '';
    } finally {
      button.disabled = false;
    }
  }

  if (Shell.data.served) {
    const form = document.getElementById('ask');
    form.hidden = false;
    form.addEventListener('submit', ask);
  }
  show(Shell.data);
})();
