package fsck

import "github.com/imagestack/imagestack/backend"

// Bounds of the copies for those who name the same cluster. What an image says
// must not fill the host.
const (
	// MaxClaims is how many claims on one cluster are met: more are no
	// accident.
	MaxClaims = 16
	// FreeCopies is how many bytes a repair may always copy.
	FreeCopies = 1 << 30
)

// CopyBudget bounds the bytes that a repair of one file copies for those who
// name the same clusters: as many as the file takes, or FreeCopies if these are
// more. The zero value has spent nothing. It is not safe for concurrent use.
type CopyBudget struct {
	spent, most int64 // most is 0 before the first question
}

// Allows tells whether n more bytes may be copied in the repair of f. A file
// that cannot tell how much it takes gets FreeCopies.
func (b *CopyBudget) Allows(f backend.File, n int64) bool {
	if b.most == 0 {
		used, err := f.Allocated()
		if err != nil {
			used = 0
		}
		b.most = max(used, FreeCopies)
	}
	return n <= b.most-b.spent
}

// Spend counts n bytes that were copied.
func (b *CopyBudget) Spend(n int64) { b.spent += n }
