"""Attention of a tree's few rows on a CPU: one small kernel instead of a library's, for a compiled step.

torch's flash attention prepares for long texts and calls a matrix library for each of its blocks; a step's products
are so small that this preparation is most of the time. Here the rows' scores, their softmax and the sum of values are
made block by block with the micro kernel of :mod:`medusa_nb.micro_gemm`, and nothing leaves the processor's caches.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from unittest.mock import patch

import sympy
import torch

from medusa_nb.micro_gemm import ANY_ROWS, COLUMNS_256, COLUMNS_512, FEW_ROWS, balanced, block_code, serves

ATTENTION = r"""
#ifndef ONCE_{{name}}
#define ONCE_{{name}}
struct {{name}}_view { const {{number}}* start; int64_t text, head, row; };  // of a tensor: data and strides

// exp(score * scale + mask - the highest of them) of one row's visible columns, 0 in the others up to read; their sum
static inline float {{name}}_softmax(
    float* score, {{number}}* weight, const {{number}}* mask, float scale, int64_t visible, int64_t read
) {
    using Vec = at::vec::Vectorized<float>;
    constexpr int64_t LANES = Vec::size();
    const Vec nothing(-std::numeric_limits<float>::infinity());
    Vec highest = nothing, sum(0.0f);
    for (int64_t c = 0; c < visible; c += LANES) {
        const int64_t here = std::min(LANES, visible - c);
        Vec x = Vec::loadu(score + c) * Vec(scale);
        {%- if masked %}
        x = x + at::vec::convert<float>(at::vec::Vectorized<{{number}}>::loadu(mask + c, here));
        {%- endif %}
        x = Vec::set(nothing, x, here);
        x.store(score + c);
        highest = at::vec::maximum(highest, x);
    }
    float most = at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, highest);
    if (most == -std::numeric_limits<float>::infinity()) most = 0;  // this row sees nothing
    int64_t c = 0;
    for (; c < visible; c += LANES) {
        Vec x = (Vec::loadu(score + c) - Vec(most)).exp_u20();
        sum = sum + x;
        at::vec::convert<{{number}}>(x).store(weight + c, LANES);
    }
    for (; c < read; c++) weight[c] = 0;
    return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, sum);
}

// out = softmax(query @ key^T * scale + mask) @ value for texts, heads and rows
static void {{name}}(
    {{name}}_view query, {{name}}_view key, {{name}}_view value, {{name}}_view mask, {{name}}_view out,
    int64_t texts, int64_t heads, int64_t key_heads, int64_t rows, int64_t span, float scale
) {
    using number = {{number}};
    using Vec = at::vec::Vectorized<float>;
    constexpr int64_t DEPTH = {{depth}}, COLUMNS = {{columns}}, ROWS = {{most_rows}}, LANES = Vec::size();
    const int64_t width = (span + COLUMNS - 1) / COLUMNS * COLUMNS;  // columns of the keys, with what fills a block
    const int64_t parts = ({{threads}} + texts * heads - 1) / (texts * heads);  // threads that share a head's rows

    #pragma omp parallel num_threads({{threads}})
    {
        std::unique_ptr<number[]> keys(new number[DEPTH * width]);
        std::unique_ptr<float[]> scores(new float[ROWS * width]);
        {%- if together == 2 %}
        std::unique_ptr<number[]> values(new number[DEPTH * width]), weights(new number[ROWS * width]);
        {%- endif %}
        alignas(64) number some[ROWS * DEPTH];
        alignas(64) float sums[ROWS * DEPTH];
        float total[ROWS];
        int64_t packed = -1;
        #pragma omp for
        for (int64_t unit = 0; unit < texts * heads * parts; unit++) {
            const int64_t part = unit % parts, head = unit / parts % heads, text = unit / parts / heads;
            const int64_t key_head = head / (heads / key_heads);
            const number* v = value.start + text * value.text + key_head * value.head;
            if (packed != text * key_heads + key_head) {
                packed = text * key_heads + key_head;
                // the keys side by side as the micro kernel reads them, [DEPTH, width]; of bfloat16 pairs of neighbours
                at::vec::transpose_mxn<float>(
                    (const float*)(key.start + text * key.text + key_head * key.head), key.row / {{together}},
                    (float*)keys.get(), width, span, DEPTH / {{together}});
                {%- if together == 2 %}
                at::vec::pack_vnni2((const uint16_t*)v, (uint16_t*)values.get(), value.row, span, DEPTH);
                {%- endif %}
            }
            for (int64_t first = part * ROWS; first < rows; first += parts * ROWS) {
                const int64_t count = std::min(ROWS, rows - first);
                const int64_t seen = {{"std::min(span, first + count)" if causal else "span"}};
                const int64_t read = (seen + {{together - 1}}) / {{together}} * {{together}};
                for (int64_t row = 0; row < count; row++)
                    std::copy_n(
                        query.start + text * query.text + head * query.head + (first + row) * query.row, DEPTH,
                        some + row * DEPTH);
                for (int64_t column = 0; column < seen; column += COLUMNS)
                    {{block_name}}_rows<false>(
                        some, keys.get() + column * {{together}}, scores.get() + column, count, DEPTH, DEPTH, width,
                        width);
                for (int64_t row = 0; row < count; row++) {
                    const int64_t visible = {{"std::min(seen, first + row + 1)" if causal else "seen"}};
                    total[row] = {{name}}_softmax(
                        scores.get() + row * width, {{weights}}.get() + row * width,
                        mask.start + text * mask.text + head * mask.head + (first + row) * mask.row, scale, visible,
                        read);
                }
                for (int64_t column = 0; column < DEPTH; column += COLUMNS)
                    {{block_name}}_rows<false>(
                        {{weights}}.get(), {{values}} + column * {{together}}, sums + column, count, read, width,
                        {{values_row}}, DEPTH);
                for (int64_t row = 0; row < count; row++) {
                    const Vec share(total[row] > 0 ? 1 / total[row] : 0);
                    number* o = (number*)out.start + text * out.text + head * out.head + (first + row) * out.row;
                    for (int64_t c = 0; c < DEPTH; c += LANES)
                        at::vec::convert<number>(Vec::loadu(sums + row * DEPTH + c) * share).store(o + c, LANES);
                }
            }
        }
    }
}
#endif
"""

CALL = r"""
{{template.header().getvalue()}}
{{block}}
{{attention}}
{%- macro view(node) -%}
{&{{kernel.index(node, [0, 0, 0, 0])}}{% for i in range(3) %}, {{kernel.stride(node, i)}}{% endfor %}}
{%- endmacro %}
extern "C"
{{kernel.def_kernel(inputs={"query": query, "key": key, "value": value, "mask": mask}, outputs={"out": out})}}
{
    {{kernel.maybe_codegen_profile()}}
    {{name}}(
        {{view(query)}}, {{view(key)}}, {{view(value)}},
        {% if mask %}{{view(mask)}}{% else %}{}{% endif %}, {{view(out)}},
        {{kernel.size(query, 0)}}, {{kernel.size(query, 1)}}, {{kernel.size(key, 1)}}, {{kernel.size(query, 2)}},
        {{kernel.size(key, 2)}}, {{scale}}
    );
}
"""


@cache
def attention_template() -> type:
    """The kernel as a class for Inductor, which is loaded only when something is compiled."""
    import torch._inductor.lowering  # noqa: F401  # must come first: the parts below import it in a circle
    from torch._inductor.codegen.cpp_template import CppTemplate
    from torch._inductor.utils import parallel_num_threads

    class RowAttention(CppTemplate):
        def __init__(self, input_nodes, layout, scale: float, causal: bool, columns: int):
            super().__init__("row_attention", input_nodes, layout, parallel_num_threads())
            self.scale, self.causal, self.columns = scale, causal, columns

        def render(self, kernel, template_buffer_node=None, **kwargs) -> str:
            query, key, value, *mask = self.input_nodes
            rows, depth = query.get_size()[2:]
            together = 2 if query.get_dtype() == torch.bfloat16 else 1
            most_rows = block_rows(rows)
            block_name, block = block_code(most_rows, self.columns, together, ahead=False)
            name = f"attention_{block_name}_of_{depth}{'_causal' * self.causal}{'_masked' * bool(mask)}"
            attention = self._template_from_string(ATTENTION).render(
                name=name,
                block_name=block_name,
                number=kernel.dtype(query),
                depth=depth,
                columns=self.columns,
                together=together,
                # in float32 the softmax takes the scores' place, and values need not be packed
                weights="weights" if together == 2 else "scores",
                values="values.get()" if together == 2 else "v",
                values_row="DEPTH" if together == 2 else "value.row",
                most_rows=most_rows,
                causal=self.causal,
                masked=bool(mask),
                threads=self.num_threads,
            )
            return self._template_from_string(CALL).render(
                template=self,
                kernel=kernel,
                query=query,
                key=key,
                value=value,
                mask=mask[0] if mask else None,
                out=template_buffer_node or self.output_node,
                name=name,
                block=block,
                attention=attention,
                scale=self.scale,
            )

    return RowAttention


@contextmanager
def own_attention() -> Iterator[None]:
    """Let Inductor write attention itself, with this kernel, where torch's flash attention would be called."""
    template = attention_template()
    from torch._inductor import ir, lowering
    from torch._inductor.select_algorithm import realize_inputs
    from torch._inductor.virtualized import V

    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    library = lowering.lowerings[flash]

    def known_equal(one, other) -> bool:
        return V.graph.sizevars.statically_known_equals(one, other)

    def lower(query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
        inputs = [x for x in (query, key, value, attn_mask) if x is not None]
        columns = columns_for(*query.get_size()[2:])
        alike = len({x.get_dtype() for x in inputs}) == 1 and serves(query.get_dtype(), 1)
        whole = attn_mask is None or known_equal(attn_mask.get_size()[3], key.get_size()[2])
        key = inputs[1] = realize_inputs(key)
        paired = query.get_dtype() == torch.float32 or known_equal(key.get_stride()[2] % 2, 0)
        if dropout_p or not (columns and alike and whole and paired):
            return library(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)
        if attn_mask is not None:
            inputs[3] = lowering.expand(attn_mask, [*query.get_size()[:3], key.get_size()[2]])
        out, _ = V.graph.current_node.meta["val"]
        strides = [s.node.expr if isinstance(s, torch.SymInt) else sympy.Integer(s) for s in out.stride()]
        made = template(
            [realize_inputs(x) for x in inputs],
            ir.FixedLayout(query.get_device(), query.get_dtype(), query.get_size(), strides),
            scale=float(scale or query.get_size()[3] ** -0.5),
            causal=is_causal,
            columns=columns,
        )
        return made.generate().output_node(), None

    with patch.dict(lowering.lowerings, {flash: lower}):
        yield


def columns_for(rows, depth) -> int:
    """Columns of a block of the micro kernel for heads of ``depth`` numbers; 0 where none fits."""
    from torch._inductor.cpu_vec_isa import VecAVX512, pick_vec_isa

    wide, narrow = COLUMNS_512 if isinstance(pick_vec_isa(), VecAVX512) else COLUMNS_256
    fitting = (wide, narrow) if block_rows(rows) <= FEW_ROWS else (narrow,)
    return next((columns for columns in fitting if int(depth) % columns == 0), 0)


def block_rows(rows) -> int:
    """Rows of a block for so many rows, a sympy expression that may be unknown."""
    return balanced(int(rows)) if rows.is_number else ANY_ROWS
