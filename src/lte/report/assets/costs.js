'use strict';
/* What the router costs and saves for this text. */

const PARTS = [['attention', 'attention', 'quiet'], ['ffn', 'FFN', 'on'], ['routers', 'routers', 'second']];
const UNITS = { flops: [2 ** 30, 'GFLOPs', '1 G = 2^30'], bytes: [2 ** 20, 'MiB', 'weights of 2 bytes, routers of 4'] };

const sumOf = (parts) => Object.values(parts).reduce((sum, value) => sum + value, 0);

class Costs {
  constructor(routing) {
    this.routing = routing;
    const { element } = Shell;
    this.picture = new Shell.Picture({
      label: 'Bars of the work per token of the dense model and of this text',
      caption: 'The bars compare the work for one token, mean over this text, with that of a model that computes all its ' +
        'neurons: skipped experts shorten the middle part, and the routers, which always run in full, add the last one.',
      options: (width) => this.options(width),
      rows: () => this.rows(),
      height: () => 300,
    });
    this.box = element('section', { class: 'panel' }, element('h3', {}, 'What the routers cost and save'),
      element('p', { class: 'told' }, this.sentence('flops')), element('p', { class: 'told' }, this.sentence('bytes')),
      this.picture.box,
      element('p', { class: 'quiet' }, 'Counted for the linear layers of the blocks, 2 FLOPs per weight; without LM ' +
        'head, embeddings, attention scores and cache. ' + this.batch()));
  }

  batch() {
    const union = `At least one token of this text uses ${Shell.percent(this.routing.union)} of all experts`;
    return this.routing.reads_at_once
      ? `An encoder reads all tokens in one go, so bytes per token hold for texts of one token. ${union}, and their ` +
        'weights are read once for all tokens.'
      : `Bytes are those of decoding one token at a time. ${union}, which is what one pass over the whole text reads.`;
  }

  sentence(kind) {
    const { cost } = this.routing;
    const [now, dense] = [cost[kind], cost[`dense_${kind}`]];
    const [unit, name] = UNITS[kind];
    const change = 1 - sumOf(now) / sumOf(dense);
    const words = kind === 'flops' ? 'computes' : 'reads';
    return `A token of this text ${words} ${(sumOf(now) / unit).toPrecision(4)} ${name} where the dense model takes ` +
      `${(sumOf(dense) / unit).toPrecision(4)}, ${Shell.percent(Math.abs(change))} ${change < 0 ? 'more' : 'less'}: skipped experts save ` +
      `${Shell.percent((dense.ffn - now.ffn) / sumOf(dense))}, the routers cost ${Shell.percent(now.routers / sumOf(dense))}.`;
  }

  options(width) {
    const { cost } = this.routing;
    const kinds = ['flops', 'bytes'];
    return {
      legend: { top: 0, left: 0, textStyle: { color: Shell.colour('ink') }, selectedMode: false },
      tooltip: Shell.tooltip(({ seriesName, name, value }) => `${name}\n${seriesName}: ${value.toPrecision(4)}`),
      grid: kinds.map((_, index) => ({ left: 72, right: 20, top: 36 + 130 * index, height: 70 })),
      xAxis: kinds.map((kind, index) => Shell.axis({ type: 'value', gridIndex: index, name: `${UNITS[kind][1]} per token`,
        nameLocation: 'middle', nameGap: 24, splitNumber: width < 500 ? 3 : 5 })),
      yAxis: kinds.map((_, index) => Shell.axis({ type: 'category', gridIndex: index, data: ['this text', 'dense'] })),
      series: kinds.flatMap((kind, index) => PARTS.map(([part, name, shade]) => ({
        type: 'bar', name, stack: kind, xAxisIndex: index, yAxisIndex: index, barWidth: 22,
        itemStyle: { color: Shell.colour(shade), borderColor: Shell.colour('panel'), borderWidth: 1 },
        data: [cost[kind][part], cost[`dense_${kind}`][part]].map((value) => value / UNITS[kind][0]),
      }))),
    };
  }

  rows() {
    const { cost } = this.routing;
    const line = (name, pick) => [name, ...['flops', 'bytes'].flatMap((kind) => [`dense_${kind}`, kind].map((key) =>
      (pick(cost[key]) / UNITS[kind][0]).toPrecision(4)))];
    const headings = Object.values(UNITS).flatMap(([, name, note]) => [`${name} dense (${note})`, `${name} this text`]);
    return ['Work per token', ['part', ...headings],
      [...PARTS.map(([part, name]) => line(name, (parts) => parts[part])), line('together', sumOf)]];
  }
}
