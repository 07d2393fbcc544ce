package rewrite

import "github.com/imagestack/imagestack/guestfs/freespace"

// mostLeaked reports whether an image may be worked on of which more is used by
// nothing than is in use.
//
// In ploop every slot that was given back inside the file looks so, for ever,
// and so a guest that trimmed most of its disk does, too. There the guest is
// asked: behind a map that was lost no filesystem proves its free space.
func (j *job) mostLeaked() (bool, error) {
	if j.o.MostLeaked {
		return true, nil
	}
	if j.t.format != "ploop" {
		return false, nil
	}
	_, areas, err := j.t.guestFree(j.ctx, &j.o)
	if err != nil {
		return false, err
	}
	judged := false
	for _, a := range areas {
		switch {
		case a.Refusal == nil && a.Name != "gaps":
			judged = true
		case a.Refusal != nil && a.Refusal.Code != freespace.NotAsked:
			return false, nil
		}
	}
	return judged, nil
}
