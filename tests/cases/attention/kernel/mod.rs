//! The attention kernels of every dtype against their formula in f64.

mod attention_delta;
mod attention_f32;
mod attention_half;
mod checks;
mod expected;
mod form;
mod inputs;
mod run;

// mutant of kernels/attention.cuh: window begins late|s/queries - left;/queries - left + 1;/
// mutant of kernels/attention.cuh: window ends early|s/queries \+ right \+ 1;/queries + right;/
// mutant of kernels/attention.cuh: first query lost|s/queries - keys - right;/queries - keys - right + 1;/
// mutant of kernels/attention.cuh: last query lost|s/keys \+ left \+ 1;/keys + left;/
// mutant of kernels/attention.cuh: length past the keys|s/min\(key_lengths\[batch\], keys\)/key_lengths[batch]/
// mutant of kernels/attention.cuh: scale above the softcap|s/args\.scale \/ args\.softcap/args.scale/
// mutant of kernels/attention.cuh: slope of the softcap|s/1\.f - tanh \* tanh/1.f/
// mutant of kernels/attention.cuh: one slope for all heads|s/alibi_slopes\[head\]/alibi_slopes[0]/
// mutant of kernels/attention.cuh: distance with a sign|s/fabsf\(float\(int\(own_key - key\)\)\)/float(int(own_key - key))/
// mutant of kernels/attention.cuh: vectors anywhere|s/is_aligned\(tensor\) && //
// mutant of kernels/attention.cuh: strides unchecked|s/\(strides\.batch \| strides\.head \| strides\.row\)/strides.batch/
// mutant of kernels/attention.cuh: softmax of rows that see nothing|s/sum == 0\.f \? RowSoftmax\{INFINITY, 0\.f\} : //
