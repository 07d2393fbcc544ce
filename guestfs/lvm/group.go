package lvm

import (
	"cmp"
	"maps"
	"slices"
	"strings"

	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/guestfs/freespace"
)

// group is a volume group while it is decoded.
type group struct {
	*Group
	pvs      map[string]*physical // by name in the text
	lvs      map[string]*section
	used     map[string]bool // names that any segment mentions
	segments map[string][]segment
}

// physical is a physical volume of the group.
type physical struct {
	*Volume
	start   int64 // byte of the disk where its first extent is
	extents int64
	claims  claims
}

// segment is a piece of a logical volume.
type segment struct {
	start, n int64 // extents of the logical volume
	linear   bool
	at       int64 // byte of the disk, when linear
}

// unknown finds a word that is not among those that are known.
func unknown(words []string, known ...string) (string, bool) {
	for _, w := range words {
		if !slices.Contains(known, w) {
			return w, true
		}
	}
	return "", false
}

// decode judges the text of a volume group.
func decode(volumes []*Volume, root *section) (*Group, error) {
	if len(root.sections) != 1 {
		return nil, damaged("metadata text: %d volume groups", len(root.sections))
	}
	if c, err := root.text("contents"); err != nil || c != "Text Format Volume Group" || root.values["version"].number != 1 {
		return nil, freespace.Refuse(freespace.UnknownFeature, "lvm: metadata text of version %d", root.values["version"].number)
	}
	g := &group{Group: &Group{}, pvs: map[string]*physical{}, used: map[string]bool{}, segments: map[string][]segment{}}
	var vg *section
	for g.Name, vg = range root.sections {
	}
	if !plainName(g.Name) {
		return nil, damaged("metadata text: volume group %q", g.Name)
	}
	if err := g.checkGroup(vg); err != nil {
		return nil, err
	}
	if err := g.findPVs(vg, volumes); err != nil {
		return nil, err
	}
	if lvs := vg.sections["logical_volumes"]; lvs != nil {
		g.lvs = lvs.sections
	}
	for name := range g.lvs {
		if err := g.addSegments(name); err != nil {
			return nil, err
		}
	}
	for _, p := range g.pvs {
		if err := p.claims.check(); err != nil {
			return nil, err
		}
		at := int64(0)
		for _, c := range append(p.claims, claim{start: p.extents}) {
			if c.start > at {
				g.Free = append(g.Free, blockmap.Range{Off: p.start + at*g.ExtentSize, Len: (c.start - at) * g.ExtentSize})
			}
			at = c.start + c.n
		}
	}
	slices.SortFunc(g.Free, func(a, b blockmap.Range) int { return cmp.Compare(a.Off, b.Off) })
	for _, name := range slices.Sorted(maps.Keys(g.lvs)) {
		lv, err := g.judge(name)
		if err != nil {
			return nil, err
		}
		g.LVs = append(g.LVs, lv)
	}
	return g.Group, nil
}

// checkGroup refuses groups that another host may use, and flags without a
// known meaning.
func (g *group) checkGroup(vg *section) error {
	status, err := vg.words("status")
	if err != nil {
		return err
	}
	if w, bad := unknown(status, "RESIZEABLE", "READ", "WRITE"); bad {
		return refuse("volume group %s has status %q", g.Name, w)
	}
	if flags, err := vg.words("flags"); err != nil || len(flags) > 0 {
		return refuse("volume group %s has flags %q", g.Name, flags)
	}
	if v, ok := vg.values["lock_type"]; ok && v.text != "none" {
		return refuse("volume group %s is shared by hosts (lock type %q)", g.Name, v.text)
	}
	if f, err := vg.text("format"); err != nil || f != "lvm2" {
		return refuse("volume group %s is of format %q", g.Name, f)
	}
	for name := range vg.sections {
		if name != "physical_volumes" && name != "logical_volumes" && name != "historical_logical_volumes" {
			return freespace.Refuse(freespace.UnknownFeature, "lvm: volume group %s has a section %q", g.Name, name)
		}
	}
	const sectors = 1 << 40
	if g.ID, err = vg.text("id"); err != nil || !plainName(g.ID) {
		return damaged("metadata text: id of volume group %s", g.Name)
	}
	n, err := vg.number("extent_size", 1, sectors)
	g.ExtentSize = n * sector
	return err
}

// findPVs finds the physical volumes of the group, all of which must be there.
func (g *group) findPVs(vg *section, volumes []*Volume) error {
	pvs := vg.sections["physical_volumes"]
	if pvs == nil || len(pvs.sections) == 0 {
		return damaged("metadata text: no physical volumes")
	}
	if n := len(pvs.sections); n != len(volumes) {
		return refuse("volume group %s has %d physical volumes, of which %d are on this disk with the same metadata", g.Name, n, len(volumes))
	}
	found := map[*Volume]bool{}
	for name, pv := range pvs.sections {
		id, err := pv.text("id")
		if err != nil {
			return err
		}
		i := slices.IndexFunc(volumes, func(v *Volume) bool { return v.uuid == strings.ReplaceAll(id, "-", "") })
		if i < 0 || found[volumes[i]] {
			return damaged("the metadata is about physical volume %.40q, which is not there", id)
		}
		found[volumes[i]] = true
		if g.pvs[name], err = g.checkPV(pv, volumes[i]); err != nil {
			return err
		}
	}
	return nil
}

// checkPV compares what the text and the label say of a physical volume.
func (g *group) checkPV(pv *section, v *Volume) (*physical, error) {
	status, err := pv.words("status")
	if err != nil {
		return nil, err
	}
	flags, err := pv.words("flags")
	if err != nil {
		return nil, err
	}
	if w, bad := unknown(append(status, flags...), "ALLOCATABLE"); bad {
		return nil, refuse("a physical volume has status %q", w)
	}
	first, err := pv.number("pe_start", 1, v.size/sector)
	if err != nil {
		return nil, err
	}
	start := first * sector
	p := &physical{Volume: v, start: v.base + start}
	if p.extents, err = pv.number("pe_count", 0, (v.size-start)/g.ExtentSize); err != nil {
		return nil, err
	}
	if start != v.data.off {
		return nil, damaged("the first extent is at %d for the metadata, at %d for the label", start, v.data.off)
	}
	end := start + p.extents*g.ExtentSize
	if end > v.data.off+v.data.n {
		return nil, damaged("%d extents of %d bytes in %d", p.extents, g.ExtentSize, v.data.n)
	}
	for _, a := range v.texts {
		if a.off < end && start < a.off+a.n {
			return nil, damaged("metadata lies in the extents, at %d", a.off)
		}
	}
	return p, nil
}

// addSegments notes what a logical volume uses.
func (g *group) addSegments(name string) error {
	lv := g.lvs[name]
	count, err := lv.number("segment_count", 0, int64(len(lv.sections)))
	if err != nil {
		return err
	}
	if int(count) != len(lv.sections) {
		return damaged("logical volume %.128q has %d sections for %d segments", name, len(lv.sections), count)
	}
	for _, s := range lv.sections {
		start, err := s.number("start_extent", 0, 1<<40)
		if err != nil {
			return err
		}
		n, err := s.number("extent_count", 1, 1<<40)
		if err != nil {
			return err
		}
		seg := segment{start: start, n: n}
		kind, err := s.text("type")
		if err != nil {
			return err
		}
		if kind == "striped" {
			err = g.addStriped(name, s, &seg)
		} else {
			err = g.addOther(name, kind, s)
		}
		if err != nil {
			return err
		}
		g.segments[name] = append(g.segments[name], seg)
	}
	return nil
}

// addStriped adds a segment whose extents are dealt out over areas in turn:
// each has a part of them, in one piece.
func (g *group) addStriped(name string, s *section, seg *segment) error {
	areas, err := s.number("stripe_count", 1, 128)
	if err != nil {
		return err
	}
	list := s.values["stripes"].list
	if int64(len(list)) != 2*areas || seg.n%areas != 0 || len(s.sections) > 0 {
		return damaged("logical volume %.128q: %d areas of %d extents", name, areas, seg.n)
	}
	for i := 0; i < len(list); i += 2 {
		on, at := list[i], list[i+1]
		if !on.isText || at.isText || at.isList {
			return damaged("logical volume %.128q: its areas", name)
		}
		p := g.pvs[on.text]
		if p == nil {
			if g.lvs[on.text] == nil {
				return damaged("logical volume %.128q lies on %.128q, which is not there", name, on.text)
			}
			g.used[on.text] = true
			continue
		}
		n := seg.n / areas
		if at.number < 0 || at.number > p.extents || n > p.extents-at.number {
			return damaged("logical volume %.128q: extents %d+%d of %d", name, at.number, n, p.extents)
		}
		p.claims = append(p.claims, claim{at.number, n, name})
		seg.linear, seg.at = areas == 1, p.start+at.number*g.ExtentSize
	}
	return nil
}

// addOther notes every name that a segment of another type mentions.
func (g *group) addOther(name, kind string, s *section) error {
	if len(s.sections) > 0 {
		return refuse("logical volume %.128q: a segment of type %.40q with sections", name, kind)
	}
	for _, v := range s.values {
		for _, e := range append(v.list, v) {
			if g.pvs[e.text] != nil && e.isText {
				return refuse("logical volume %.128q: a segment of type %.40q lies on a physical volume", name, kind)
			}
			g.used[e.text] = true
		}
	}
	return nil
}

// judge finds out whether a logical volume can be looked into.
func (g *group) judge(name string) (LV, error) {
	lv := LV{Name: name}
	if !plainName(name) {
		return lv, damaged("metadata text: logical volume %.128q", name)
	}
	segs := g.segments[name]
	slices.SortFunc(segs, func(a, b segment) int { return int(a.start - b.start) })
	at, linear := int64(0), true
	for _, s := range segs {
		if s.start != at || s.n > 1<<62/g.ExtentSize-at {
			return lv, damaged("logical volume %s: a segment at extent %d, want %d", name, s.start, at)
		}
		linear = linear && s.linear
		if p := len(lv.Pieces) - 1; linear {
			e := g.ExtentSize
			next := Piece{at * e, s.at, s.n * e}
			if p >= 0 && lv.Pieces[p].At+lv.Pieces[p].Len == next.At {
				lv.Pieces[p].Len += next.Len
			} else {
				lv.Pieces = append(lv.Pieces, next)
			}
		}
		at += s.n
	}
	lv.Size = at * g.ExtentSize
	status, err := g.lvs[name].words("status")
	if err != nil {
		return lv, err
	}
	flags, err := g.lvs[name].words("flags")
	if err != nil {
		return lv, err
	}
	var why error
	switch w, bad := unknown(append(status, flags...), "READ", "WRITE", "VISIBLE"); {
	case bad:
		why = refuse("logical volume %s has status %q", name, w)
	case !slices.Contains(status, "READ") || !slices.Contains(status, "VISIBLE"):
		why = refuse("logical volume %s is a hidden part of another", name)
	case !linear || len(segs) == 0:
		why = refuse("logical volume %s is not linear", name)
	case g.used[name]:
		why = refuse("logical volume %s is the base of another (snapshot, pool, cache, …)", name)
	}
	if why != nil {
		lv.Pieces, lv.Refusal = nil, freespace.AsRefusal(why)
	}
	return lv, nil
}
