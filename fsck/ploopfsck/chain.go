package ploopfsck

import (
	"fmt"

	"github.com/imagestack/imagestack/fsck"
)

// maxLoops bounds for how many loops a parent is looked for: each takes a walk
// from every leaf.
const maxLoops = 16

// checkShots looks at the tree of snapshots.
func (d *descriptor) checkShots() {
	if d.snapshots == nil {
		if len(d.images) > 1 {
			d.report(codeDescStructure, "Snapshots", nil, fmt.Sprintf("missing, with %d images", len(d.images)))
		}
		return
	}
	seen := map[string]bool{}
	for _, s := range d.shots {
		switch {
		case s.guid == "":
			d.wrongShotGUID(s)
			continue
		case seen[s.guid]:
			d.report(codeDescDuplicate, s.field+"/GUID", s.guid, "another snapshot has the same GUID")
		}
		seen[s.guid] = true
		if d.image(s.guid) == nil {
			d.shotAlone(s)
		}
	}
	for _, i := range d.images {
		if i.guid != "" && d.shot(i.guid) == nil {
			d.imageAlone(i)
		}
	}
	d.checkTop()
	d.checkParents()
}

// wrongShotGUID handles a malformed GUID: the only image without a snapshot
// tells it.
func (d *descriptor) wrongShotGUID(s *shot) {
	f := d.place(codeDescGUID, s.field+"/GUID", s.n.value("GUID"), "not a GUID")
	lone := d.tree.imagesAlone
	if d.tree.badShots != 1 || len(lone) != 1 {
		d.report(f.Code, f.Place.Field, f.Place.Value, f.Text)
		return
	}
	d.offer(f, fsck.Full, "set it to "+lone[0].guid+", the only image without a snapshot", nil, setText(d.b, s.n, "GUID", lone[0].guid))
}

// shotAlone handles a snapshot without an image: its file may lie beside the
// descriptor; a snapshot on which nothing stands can be given up.
func (d *descriptor) shotAlone(s *shot) {
	f := d.place(codeDescNoImage, s.field+"/GUID", s.guid, "no image has this GUID")
	if len(d.tree.imagesAlone) > 0 || d.tree.unsettled() {
		d.report(f.Code, f.Place.Field, f.Place.Value, f.Text) // decided with those
		return
	}
	if name := d.onlyOrphan(s.guid); name != "" && len(d.tree.shotsAlone) == 1 && len(d.images) > 0 {
		last := d.images[len(d.images)-1]
		element := fmt.Sprintf("<Image><GUID>%s</GUID><Type>%s</Type><File>%s</File></Image>", s.guid, escaped(last.typ), escaped(name))
		d.offer(f, fsck.Full, fmt.Sprintf("name %s as its image, the only one in the directory that nothing names, which is likely and not proved", name),
			nil, addBehind(d.b, last.n, element))
		return
	}
	if d.tree.isLeaf(s) && s.guid != d.topGUID {
		d.offer(f, fsck.Full, "take the snapshot out of the descriptor; nothing stands on it", nil, remove(d.b, s.n))
		return
	}
	d.report(f.Code, f.Place.Field, f.Place.Value, f.Text)
}

// imageAlone handles an image without a snapshot.
func (d *descriptor) imageAlone(i *image) {
	f := d.place(codeDescNoShot, i.field+"/GUID", i.guid, "no snapshot has this GUID")
	alone := d.tree.shotsAlone
	switch {
	case d.tree.unsettled():
		d.report(f.Code, f.Place.Field, f.Place.Value, f.Text)
	case len(alone) == 1 && len(d.tree.imagesAlone) == 1:
		d.offer(f, fsck.Full, "set it to "+alone[0].guid+", the only snapshot without an image", nil, setText(d.b, i.n, "GUID", alone[0].guid))
	case len(alone) > 0:
		d.report(f.Code, f.Place.Field, f.Place.Value, f.Text)
	case i.guid == d.topGUID && d.image(i.guid) != i:
		d.report(f.Code, f.Place.Field, f.Place.Value, f.Text) // once is enough
	case i.guid == d.topGUID:
		// The current state: it stands on the only one that is no parent.
		parent, leaves := noParent, d.tree.leaves
		if len(leaves) == 1 {
			parent = leaves[0].guid
		}
		var edits []edit
		if len(leaves) == 1 || len(d.shots) == 0 {
			element := fmt.Sprintf("<Shot><GUID>%s</GUID><ParentGUID>%s</ParentGUID></Shot>", i.guid, parent)
			edits = addChild(d.b, d.snapshots, element)
		}
		d.offer(f, fsck.Full, "enter it as the current state over "+parent+", which is likely and not proved", nil, edits)
	default:
		d.offer(f, fsck.Full, "take it out of the descriptor; the file stays", nil, remove(d.b, i.n))
	}
}

// checkTop looks at the current state.
func (d *descriptor) checkTop() {
	if d.shot(d.topGUID) != nil || d.image(d.topGUID) != nil {
		return
	}
	value, code := d.snapshots.value("TopGUID"), codeDescTop
	text := "no snapshot has this GUID"
	if d.topGUID == "" {
		code, text = codeDescGUID, "not a GUID"
	}
	f := d.place(code, "Snapshots/TopGUID", value, text)
	var top *shot
	leaves := d.tree.leaves
	if len(leaves) == 1 {
		top = leaves[0]
	}
	for _, l := range leaves {
		if l.guid == defaultTop {
			top = l // the constant name that ploop gives it
		}
	}
	if top == nil || d.tree.unsettled() {
		d.report(f.Code, f.Place.Field, f.Place.Value, f.Text)
		return
	}
	d.offer(f, fsck.Full, "set it to "+top.guid+", which is no other's parent", nil, setText(d.b, d.snapshots, "TopGUID", top.guid))
}

// checkParents looks for parents that do not exist and for loops.
func (d *descriptor) checkParents() {
	var lost []*shot
	for _, s := range d.shots {
		if s.parent != noParent && d.shot(s.parent) == nil {
			lost = append(lost, s)
		}
	}
	for _, s := range lost {
		code, text := codeDescParent, "no snapshot has this GUID"
		if s.parent == "" {
			code, text = codeDescGUID, "not a GUID"
		}
		f := d.place(code, s.field+"/ParentGUID", s.n.value("ParentGUID"), text)
		d.newParent(f, s, len(lost) == 1)
	}
	loops := 0
	state := map[*shot]int{} // 1: on the way, 2: done
	for _, s := range d.shots {
		var way []*shot
		at := s
		for at != nil && state[at] == 0 {
			state[at] = 1
			way = append(way, at)
			at = d.shot(at.parent)
		}
		if at != nil && state[at] == 1 {
			loops++
			d.loop(at, loops <= maxLoops)
		}
		for _, w := range way {
			state[w] = 2
		}
	}
}

// loop handles snapshots that are each other's parents. at is one of them. The
// current state is no snapshot's parent, so whoever names it is wrong.
func (d *descriptor) loop(at *shot, settle bool) {
	var bad *shot
	n := 0
	for s := at; n == 0 || s != at; s = d.shot(s.parent) {
		n++
		if s.parent == d.topGUID {
			bad = s
		}
	}
	if n == 1 {
		bad = at
	}
	f := d.place(codeDescLoop, at.field+"/ParentGUID", at.parent, "snapshots form a loop")
	if bad == nil {
		d.report(f.Code, f.Place.Field, f.Place.Value, f.Text)
		return
	}
	f.Place.Field, f.Place.Value = bad.field+"/ParentGUID", bad.parent
	d.newParent(f, bad, settle)
}

// newParent offers the parent that a snapshot has to have: none if there is no
// base, else the only one on which nothing stands.
func (d *descriptor) newParent(f fsck.Finding, s *shot, only bool) {
	if !only || d.tree.unsettled() {
		d.report(f.Code, f.Place.Field, f.Place.Value, f.Text)
		return
	}
	want := ""
	if d.tree.roots == 0 {
		want = noParent
	} else {
		var fit []*shot
		for _, l := range d.tree.leaves {
			if l != s && l.guid != d.topGUID && !d.tree.standsOn(l, s) && d.mayStandOn(s, l) {
				fit = append(fit, l)
			}
		}
		if len(fit) == 1 {
			want = fit[0].guid
		}
	}
	if want == "" {
		d.report(f.Code, f.Place.Field, f.Place.Value, f.Text)
		return
	}
	why := ", the only one on which nothing stands"
	if want == noParent {
		why = ": no other snapshot is the base"
	}
	d.offer(f, fsck.Full, "set it to "+want+why+"; likely and not proved", nil, setText(d.b, s.n, "ParentGUID", want))
}

// mayStandOn reports whether nothing that is known of the images speaks
// against it: a parent is never longer than its child.
func (d *descriptor) mayStandOn(child, parent *shot) bool {
	c, p := d.image(child.guid), d.image(parent.guid)
	if c == nil || p == nil || c.facts == nil || p.facts == nil || !c.facts.known() || !p.facts.known() {
		return true
	}
	return p.facts.size <= c.facts.size
}
