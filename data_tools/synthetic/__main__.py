"""python -m data_tools.synthetic"""

from data_tools.synthetic.shards import main

if __name__ == "__main__":
    main()
