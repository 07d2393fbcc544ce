package scavenge

import (
	"github.com/imagestack/imagestack/blockmap"
	"github.com/imagestack/imagestack/fsck"
)

// ReportVersion is the version of the JSON form of a Report
// (docs/scavenge.md). It goes up when a key changes its meaning or goes away.
const ReportVersion = 1

// Proofs, as they stand in a report. They are an interface.
const (
	ProofSurvived  = "surviving-entry"    // of the BAT or the L1 table
	ProofFoundL1   = "found-l1"           // an L1 table that was recognised
	ProofSnapshot  = "snapshot-l1"        // the table that an internal snapshot has there too
	ProofOnlyPlace = "only-place"         // the disk has one place for it
	ProofGuest     = "guest-metadata"     // checksummed metadata says where it belongs
	ProofShared    = "shared-clusters"    // shares clusters with a table whose place is known
	ProofTails     = "file-ends"          // the ends of the files that belong there, see tails.go
	GuessRun       = "guess-order"        // between two proven neighbours, in the order of allocation
	maxListed      = 10000                // rows of each list in a report
	maxWhy         = 64                   // notes
	whyNone        = "no evidence"        // unplaced: nothing says where it belongs
	whyConflict    = "conflict"           // several pieces have proof for one place
	whyUnclear     = "unclear"            // its evidence contradicts itself
	whyStale       = "not in use"         // the reference counts say so
	whyOccupied    = "place taken"        // its place belongs to a surviving entry
	whyExtension   = "format extension"   // not part of the disk
	whySnapshot    = "of a snapshot"      // what the active state has there was not found
	whyNoTable     = "lost L2 table"      // in use, but no table maps it
	whyElsewhere   = "entry contradicted" // an entry and the content disagree
)

// Report is the result of a run.
type Report struct {
	Version int    `json:"version"`
	Exit    int    `json:"exit"` // fsck(8) bits
	Image   string `json:"image"`
	New     string `json:"new,omitempty"` // "" when nothing was found
	Format  string `json:"format"`
	To      string `json:"new-format"`

	ClusterSize int64 `json:"cluster-size"`
	VirtualSize int64 `json:"virtual-size"`
	// Geometry says where each number comes from: header, flag or inferred.
	Geometry map[string]string `json:"geometry"`

	Filesystems []Filesystem `json:"filesystems"`
	Notes       []string     `json:"notes"`

	Pieces       int64            `json:"pieces"` // L2 tables, or data clusters, that were found
	Placed       map[string]int64 `json:"placed"` // pieces by proof
	Clusters     int64            `json:"clusters-found"`
	PlacedBytes  int64            `json:"placed-bytes"`  // of the disk
	GuessedBytes int64            `json:"guessed-bytes"` // of these, by guesses
	ZeroClusters int64            `json:"zero-clusters"` // unplaced, and only zeros

	Places   []Place    `json:"places"`
	Unplaced []Unplaced `json:"unplaced"`
	// UnplacedBytes counts all, also those that the list has no room for.
	UnplacedBytes int64           `json:"unplaced-bytes"`
	Unknown       []fsck.RangeDoc `json:"unknown"` // ranges of the disk of which nothing is known
	UnknownBytes  int64           `json:"unknown-bytes"`
	Unreadable    []fsck.RangeDoc `json:"unreadable"` // ranges of the disk whose content could not be read
	LostFound     string          `json:"lost-found,omitempty"`
}

// Filesystem is one that was found in the content.
type Filesystem struct {
	Type   string `json:"type"`
	UUID   string `json:"uuid"`
	Size   int64  `json:"size"`
	Base   *int64 `json:"base,omitempty"` // where it begins on the disk, when that is proven
	Basis  string `json:"basis"`          // the proof, or why there is none
	Blocks int64  `json:"metadata-blocks"`
}

// Place is a run of pieces that got a place.
type Place struct {
	Guest  int64  `json:"guest"` // bytes of the disk
	Length int64  `json:"length"`
	Host   int64  `json:"host"` // of the first cluster, or of the L2 table
	Proof  string `json:"proof"`
	Votes  int64  `json:"votes,omitempty"` // metadata blocks that say so
}

// Unplaced is something that has no proven place.
type Unplaced struct {
	Host   int64   `json:"host"`
	Length int64   `json:"length"` // bytes of content
	Why    string  `json:"why"`
	Places []int64 `json:"candidates,omitempty"` // guest offsets that its evidence names
	File   string  `json:"file,omitempty"`       // in the lost+found directory
}

func (r *Report) note(s string) {
	if len(r.Notes) < maxWhy {
		r.Notes = append(r.Notes, s)
	}
}

func (r *Report) place(p Place) {
	if n := len(r.Places); n > 0 {
		// A run of clusters is one row.
		l := &r.Places[n-1]
		if l.Proof == p.Proof && l.Guest+l.Length == p.Guest && l.Host+l.Length == p.Host {
			l.Length += p.Length
			l.Votes += p.Votes
			return
		}
	}
	if len(r.Places) < maxListed {
		r.Places = append(r.Places, p)
	}
}

func addRange(list []fsck.RangeDoc, r blockmap.Range) []fsck.RangeDoc {
	if n := len(list); n > 0 && list[n-1].Offset+list[n-1].Length == r.Off {
		list[n-1].Length += r.Len
		return list
	}
	if len(list) < maxListed {
		list = append(list, fsck.RangeDoc{Offset: r.Off, Length: r.Len})
	}
	return list
}
