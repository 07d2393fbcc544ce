package ploopfsck

import "path"

// tree is what the checks ask of the images and snapshots for each of them.
// None of it changes during a check, so it is found out once: a descriptor has
// room for many thousands, and its checks take time in proportion to them.
type tree struct {
	images map[string]*image // by GUID, the first of each
	shots  map[string]*shot
	files  map[string]int // how many images have a file of that base name

	badImages, badShots int // malformed GUIDs
	missing             int // images without a file
	roots               int // snapshots without a parent
	types               int // kinds of the images that are known kinds
	oneType             string
	imagesAlone         []*image // those without a snapshot
	shotsAlone          []*shot  // those without an image
	leaves              []*shot  // those that are no other's parent
	leaf, belowTop      map[*shot]bool
	whole               bool // every snapshot says which its parent is
}

func newTree(images []*image, shots []*shot, top string) tree {
	t := tree{images: map[string]*image{}, shots: map[string]*shot{}, files: map[string]int{},
		leaf: map[*shot]bool{}, belowTop: map[*shot]bool{}, whole: true}
	parents := map[string]bool{}
	for _, s := range shots {
		parents[s.parent] = true
		if s.parent == noParent {
			t.roots++
		}
		if s.guid == "" {
			t.badShots++
		} else if t.shots[s.guid] == nil {
			t.shots[s.guid] = s
		}
	}
	t.readImages(images)
	for _, s := range shots {
		if s.guid == "" || s.parent != noParent && t.shots[s.parent] == nil {
			t.whole = false
		}
		if s.guid != "" && t.images[s.guid] == nil {
			t.shotsAlone = append(t.shotsAlone, s)
		}
		if s.guid != "" && !parents[s.guid] {
			t.leaves = append(t.leaves, s)
			t.leaf[s] = true
		}
	}
	for s := t.shots[top]; s != nil && !t.belowTop[s]; s = t.shots[s.parent] {
		t.belowTop[s] = true
	}
	return t
}

func (t *tree) readImages(images []*image) {
	types := map[string]bool{}
	for _, i := range images {
		t.files[path.Base(i.file)]++
		if i.missing || i.file == "" {
			t.missing++
		}
		if i.typ == "Plain" || i.typ == "Compressed" {
			types[i.typ] = true
			t.oneType = i.typ
		}
		if i.guid == "" {
			t.badImages++
			continue
		}
		if t.images[i.guid] == nil {
			t.images[i.guid] = i
		}
		if t.shots[i.guid] == nil {
			t.imagesAlone = append(t.imagesAlone, i)
		}
	}
	if t.types = len(types); t.types != 1 {
		t.oneType = ""
	}
}

// image returns the image of a GUID, nil without one.
func (d *descriptor) image(guid string) *image { return d.tree.images[guid] }

func (d *descriptor) shot(guid string) *shot { return d.tree.shots[guid] }

// unsettled reports whether a GUID is malformed: what follows from it waits
// until that is repaired.
func (t *tree) unsettled() bool { return t.badImages+t.badShots > 0 }

// isLeaf reports whether certainly nothing stands on s.
func (t *tree) isLeaf(s *shot) bool { return t.whole && t.leaf[s] }

// standsOn reports whether a has b among its parents.
func (t *tree) standsOn(a, b *shot) bool {
	for n := 0; a != nil && n <= len(t.shots); n++ {
		if a == b {
			return true
		}
		a = t.shots[a.parent]
	}
	return false
}
