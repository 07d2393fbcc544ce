package fsck

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/imagestack/imagestack/blockmap"
)

func baseName(path string) string { return filepath.Base(path) }

// mtimeOf is the modification time in nanoseconds since 1970, 0 when it cannot
// be had.
func mtimeOf(path string) int64 {
	st, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return st.ModTime().UnixNano()
}

// WriteJSON writes what people and scripts need to find data by hand: the
// identity, the description, where the metadata lies, and the whole map, an
// extent a line.
func (d *Dumped) WriteJSON(ctx context.Context, out io.Writer) error {
	w := bufio.NewWriterSize(out, 256<<10)
	id, err := json.Marshal(d.ID)
	if err != nil {
		return err
	}
	info, err := json.Marshal(d.Info)
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "{\"version\": %d,\n\"identity\": %s,\n\"info\": %s,\n\"metadata\": [", dumpVersion, id, info)
	for i, m := range d.meta {
		sep := ","
		if i == 0 {
			sep = ""
		}
		fmt.Fprintf(w, "%s\n{\"offset\": %d, \"length\": %d, \"role\": %q}", sep, m.off, m.n, m.role)
	}
	fmt.Fprintf(w, "],\n\"map\": [")
	sep := "\n"
	if d.layer.Size() > 0 {
		for e, err := range blockmap.All(ctx, d.layer, 0, d.layer.Size()) {
			if err != nil {
				return errors.Join(err, w.Flush())
			}
			if e.Kind == blockmap.Unmapped {
				continue
			}
			fmt.Fprintf(w, "%s{\"guest\": %d, \"length\": %d, \"kind\": %q", sep, e.Guest, e.Len, e.Kind)
			if e.Stored() {
				fmt.Fprintf(w, ", \"host\": %d", e.Host)
			}
			if e.Kind == blockmap.Packed {
				fmt.Fprintf(w, ", \"packed-length\": %d", e.PackedLen)
			}
			if _, err := w.WriteString("}"); err != nil {
				return err
			}
			sep = ",\n"
		}
	}
	fmt.Fprintf(w, "]}\n")
	return errors.Join(w.Flush(), d.Unchanged(ctx))
}
