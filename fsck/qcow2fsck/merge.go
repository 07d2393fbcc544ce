package qcow2fsck

import (
	"cmp"
	"math/bits"
	"slices"
)

// merge sorts a list, joins what names the same table from the same index, and
// leaves at most maxRivals records of each table, the most credible ones. Runs
// that do not go together are taken apart; where that made more than most of
// them, the list ends at the cluster that is returned instead of hi.
func merge(list []tableRec, crowds map[int64]*crowd, most int, hi int64) ([]tableRec, int64) {
	list = joined(list)
	list, hi = apart(list, most, hi)
	out := list[:0]
	for i := 0; i < len(list); {
		j := i + 1
		for j < len(list) && list[j].cluster == list[i].cluster {
			j++
		}
		group := list[i:j]
		i = j
		if len(group) > maxRivals {
			slices.SortFunc(group, func(a, b tableRec) int {
				return cmp.Or(cmp.Compare(credit(&b), credit(&a)), cmp.Compare(a.idx, b.idx))
			})
			w := crowds[group[0].cluster]
			if w == nil {
				w = new(crowd)
				crowds[group[0].cluster] = w
			}
			for k := maxRivals; k < len(group); k++ {
				w.add(&group[k])
			}
			group = group[:maxRivals]
			w.rivals, w.credit = w.rivals[:0], credit(&group[maxRivals-1])
			for k := range group {
				w.rivals = append(w.rivals, group[k].idx)
			}
			slices.SortFunc(group, byPlace)
		}
		out = append(out, group...)
	}
	return out, hi
}

func byPlace(a, b tableRec) int {
	if a.cluster != b.cluster { // nearly always, and there are millions
		if a.cluster < b.cluster {
			return -1
		}
		return 1
	}
	return cmp.Or(cmp.Compare(a.idx, b.idx), cmp.Compare(a.owner, b.owner))
}

// sortRecs sorts by place. Of millions of tables in no order at all it makes
// heaps first that fit into the caches of a processor.
func sortRecs(list []tableRec) {
	const heaps = 1 << 12
	if len(list) < 16*heaps || slices.IsSortedFunc(list, byPlace) {
		slices.SortFunc(list, byPlace)
		return
	}
	lo, hi := list[0].cluster, list[0].cluster
	for i := range list {
		lo, hi = min(lo, list[i].cluster), max(hi, list[i].cluster)
	}
	shift := bits.Len64(uint64(hi-lo) / heaps)
	heap := func(r *tableRec) int64 { return (r.cluster - lo) >> shift }
	var next, end [heaps]int
	for i := range list {
		end[heap(&list[i])]++
	}
	for h := 1; h < heaps; h++ {
		next[h] = end[h-1]
		end[h] += end[h-1]
	}
	first := next
	for h := range int64(heaps) {
		for next[h] < end[h] {
			r := &list[next[h]]
			if to := heap(r); to != h {
				*r, list[next[to]] = list[next[to]], *r
				next[to]++
			} else {
				next[h]++
			}
		}
	}
	for h := range heaps {
		slices.SortFunc(list[first[h]:end[h]], byPlace)
	}
}

// joined sorts a list and joins what names the same tables from the same indexes.
func joined(list []tableRec) []tableRec {
	sortRecs(list)
	out := list[:0]
	for _, r := range list {
		if n := len(out); n > 0 && out[n-1].cluster == r.cluster && out[n-1].idx == r.idx && out[n-1].more == r.more {
			out[n-1].weight += r.weight
			out[n-1].copied = out[n-1].copied || r.copied
			continue
		}
		out = append(out, r)
	}
	return out
}

// apart makes single tables of runs of a sorted list that overlap others, up to
// the cluster that it returns, which is hi if that makes at most most records.
func apart(list []tableRec, most int, hi int64) ([]tableRec, int64) {
	var out []tableRec // once a run was taken apart
	split := false
	for i := 0; i < len(list); {
		j, end, runs := i+1, list[i].end(), list[i].more > 0
		for ; j < len(list) && list[j].cluster < end; j++ {
			end = max(end, list[j].end())
			runs = runs || list[j].more > 0
		}
		group := list[i:j]
		alone := j == i+1 || !runs
		if !alone && !split {
			out, split = slices.Clone(list[:i]), true
		}
		switch {
		case !split:
		case alone:
			out = append(out, group...)
		default:
			room := max(most-len(out), 1)
			cut := end
			for cut > group[0].cluster+1 && countBelow(group, cut) > int64(room) {
				cut = group[0].cluster + (cut-group[0].cluster)/2
			}
			from := len(out)
			for g := range group {
				for k := range group[g].cut(cut) {
					out = append(out, group[g].table(k))
				}
			}
			out = out[:from+len(joined(out[from:]))]
			if cut < end {
				return out, cut
			}
		}
		i = j
	}
	if !split {
		return list, hi
	}
	return out, hi
}

// countBelow is the number of tables in front of a cluster.
func countBelow(list []tableRec, cluster int64) (n int64) {
	for i := range list {
		n += list[i].cut(cluster)
	}
	return n
}
